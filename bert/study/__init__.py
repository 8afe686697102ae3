"""Studies: models compared on the same data by runs that follow from one YAML (`python -m bert.study`)."""
