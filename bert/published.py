"""Published figures to put results beside, each with its source. Devlin's are test scores, the others dev scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A published figure, or that one was looked for and not found (`value` None, not confirmed)."""

    value: float | None
    source: str
    confirmed: bool = True  # False: second-hand, or nobody could confirm it


M2_README = "github.com/HazyResearch/m2, bert/README.md"
DEVLIN = "Devlin et al. 2019 (arXiv 1810.04805), table 1; test set"
HYDRA = "Hydra (arXiv 2407.09941), table 4; second-hand"
TOGETHER_TABLE = "together.ai, post on long-context retrieval with Monarch Mixer"
TOGETHER = f"{TOGETHER_TABLE}; one A100"
UNCONFIRMED = Figure(None, "looked for, not found", confirmed=False)

# Recipe -> parameters, as rounded there.
PARAMETERS = {
    "m2-base": Figure(80e6, M2_README),
    "m2-base-960": Figure(110e6, M2_README),
    "m2-large-260m": Figure(260e6, M2_README),
    "m2-large-341m": Figure(341e6, M2_README),
    "bert-base": UNCONFIRMED,
    "hf-bert-base": Figure(110e6, TOGETHER_TABLE),
}

# Recipes of ours, and those whose published models are of the same form, in one width or another.
SAME_FORM = {"m2-base-plus": ("m2-base", "m2-base-960")}

# Recipe -> GLUE average in hundredths, and the convention it is in (bert.glue.metrics.AVERAGES).
GLUE_AVERAGE = {
    "m2-base": ("paper", Figure(79.9, M2_README)),
    "m2-base-960": ("paper", Figure(80.9, M2_README)),
    "m2-large-260m": ("paper", Figure(82.2, M2_README)),
    "m2-large-341m": ("paper", Figure(82.8, M2_README)),
    "hf-bert-base": ("devlin", Figure(79.6, DEVLIN)),
    "hf-bert-large": ("devlin", Figure(82.1, DEVLIN)),
    "bert-base": ("mosaicbert", Figure(83.5, f"{HYDRA}: BERT on C4", confirmed=False)),
}


def _row(source: str, confirmed: bool, **values: float) -> dict[str, Figure]:
    return {name.replace("_", "-"): Figure(value, source, confirmed) for name, value in values.items()}


# Recipe -> column of its convention -> score in hundredths.
GLUE_COLUMNS = {
    "m2-base-960": _row(
        HYDRA, False, MNLI=80.5, QNLI=86.0, QQP=87.0, RTE=69.3, SST_2=92.3, MRPC=89.2, CoLA=56.0, STS_B=86.9
    ),
    "bert-base": _row(
        f"{HYDRA}: BERT on C4",
        False,
        **{
            "MNLI": 84.4,
            "QNLI": 90.3,
            "QQP": 89.7,
            "RTE": 77.1,
            "SST_2": 92.3,
            "MRPC": 90.7,
            "CoLA": 54.2,
            "STS_B": 89.1,
        },
    ),
    "hf-bert-base": _row(
        DEVLIN,
        True,
        **{"MNLI_m": 84.6, "MNLI_mm": 83.4, "QNLI": 90.5, "QQP": 71.2, "RTE": 66.4, "SST_2": 93.5},
        **{"MRPC": 88.9, "CoLA": 52.1, "STS_B": 85.8},
    ),
    "hf-bert-large": _row(
        DEVLIN,
        True,
        **{"MNLI_m": 86.7, "MNLI_mm": 85.9, "QNLI": 92.7, "QQP": 72.1, "RTE": 70.1, "SST_2": 94.9},
        **{"MRPC": 89.3, "CoLA": 60.5, "STS_B": 86.5},
    ),
}

LENGTHS = (512, 1024, 2048, 4096, 8192)
# Model -> length -> tokens/ms of the forward pass. Missing lengths: not found.
THROUGHPUT = {
    "m2-base": {512: 386.3, 4096: 353.9, 8192: 320.1},
    "hf-bert-base": {512: 206.1, 4096: 39.0},
    "bert-base": {512: 367.4, 4096: 179.1, 8192: 102.4},  # there with FlashAttention
}

OUT_OF_MEMORY = Figure(None, f"out of memory ({TOGETHER})")

STEPS = Figure(70_000, "m2 yamls/pretrain: 286,720,000 samples in batches of 4,096")
POSITIONS = 286_720_000 * 128  # of the samples of those steps
TOKENS = Figure(36.5e9, "the authors' blog: 36.5B tokens of C4")
DEVICE_HOURS = {"hf-bert-base": Figure(8 * 11.5, "MosaicML examples README: about 11.5 h on 8 A100 to GLUE 83.3")}
