"""rxnmapper's ALBERT: a masked language model of chemical reactions, written as SMILES."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .common import Array, Run, require, wheel_file

FOLDER = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
TOKEN = re.compile(
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)
"""The SMILES tokens of Schwaller et al., "Molecular Transformer" (2019), with which the model was trained."""

REACTIONS = {
    "thioether synthesis": "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "acetylation": "O=C(O)c1ccccc1O.CC(=O)OC(C)=O>>CC(=O)Oc1ccccc1C(=O)O",
    "Suzuki coupling": "OB(O)c1ccccc1.Brc1ccncc1.O=C([O-])[O-].[Na+].[Na+]>>c1ccc(-c2ccncc2)cc1",
    "amide coupling": "C1COCCN1.O=C(Cl)c1ccccc1.CCN(CC)CC>>O=C(c1ccccc1)N1CCOCC1",
}

BATCHES, PADDED_LENGTH = 3, 80


class MaskedLanguageModel(nn.Module):
    """transformers' AlbertForMaskedLM with tensors in and the logits out."""

    def __init__(self, albert: nn.Module) -> None:
        super().__init__()
        self.albert = albert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.albert(input_ids=input_ids, attention_mask=attention_mask).logits


def model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The module, and two reactions of different lengths: int64 token numbers and mask, both [batch, length <= 512]."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig.from_json_file(wheel_file("rxnmapper", f"{FOLDER}/config.json"))
    albert = AlbertForMaskedLM(config)
    weights = torch.load(wheel_file("rxnmapper", f"{FOLDER}/pytorch_model.bin"), map_location="cpu", weights_only=True)
    # The checkpoint has a pooler, which masked language modelling does not use.
    albert.load_state_dict({name: value for name, value in weights.items() if not name.startswith("albert.pooler.")})
    ids, mask = pad([encode(REACTIONS["Suzuki coupling"]), encode(REACTIONS["acetylation"])])
    return MaskedLanguageModel(albert).eval(), (torch.from_numpy(ids), torch.from_numpy(mask))


def vocabulary() -> dict[str, int]:
    text = wheel_file("rxnmapper", f"{FOLDER}/vocab.txt").read_text(encoding="utf-8")
    return {token: number for number, token in enumerate(text.splitlines())}


def encode(reaction: str) -> list[int]:
    numbers = vocabulary()
    return [numbers[token] for token in ("[CLS]", *TOKEN.findall(reaction), "[SEP]")]


def pad(rows: list[list[int]], length: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token numbers and attention mask, [len(rows), the longest row or ``length``]; [PAD] is number 0."""
    length = max(length, *map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows], dtype=np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], dtype=np.int64)
    return ids, mask


def check(run: Run) -> str:
    """Each token of a reaction's product, masked, is filled in again, and as surely in a batch of padded reactions."""
    numbers = vocabulary()
    rows, hidden, alone = [], [], []
    for reaction in REACTIONS.values():
        row = encode(reaction)
        at = list(range(row.index(numbers[">>"]) + 1, len(row) - 1))
        masked = [[*row[:i], numbers["[MASK]"], *row[i + 1 :]] for i in at]
        alone.append(probabilities(run, *pad(masked))[range(len(at)), at])
        rows += masked
        hidden += [(i, row[i]) for i in at]

    together = np.concatenate(alone)
    for first in range(BATCHES):
        # Every third row: neighbours differ in what they are and in how long they are.
        batch = rows[first::BATCHES]
        at = [i for i, _ in hidden[first::BATCHES]]
        together[first::BATCHES] = probabilities(run, *pad(batch, PADDED_LENGTH))[range(len(batch)), at]

    right = int(np.sum(together.argmax(axis=-1) == [token for _, token in hidden]))
    moved = float(np.nan_to_num(np.abs(together - np.concatenate(alone)), nan=np.inf).max())
    figures = f"{right} of {len(hidden)} masked product tokens filled in"
    require(right / len(hidden) > 0.95, f"only {figures} (over 95 % is right)")
    require(moved < 0.02, f"padding changed a probability by {moved:.4f} (under 0.02 is right)")
    return f"{figures}; padding changes a probability by at most {moved:.1e}"


def probabilities(run: Run, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> Array:
    """float64 [batch, length, vocabulary]."""
    logits = run({"input_ids": ids, "attention_mask": mask})["logits"].astype(np.float64)
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)
