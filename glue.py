"""Fine-tune on GLUE: python glue.py yamls/finetune-glue/m2-base.yaml checkpoint=runs/m2-base [key=value ...]."""

import sys

from bert.glue.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
