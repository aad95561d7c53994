"""Caption features of a frozen encoder, computed once where they fit into memory."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.text import FrozenEncoder

LIMIT_BYTES = 1 << 30


class CaptionFeatures:
    """Features [B, T, D] of a batch's captions: read from memory where all of the data set's fit (ragged, bf16), encoded in the step otherwise."""

    def __init__(self, encoder: FrozenEncoder, dataset: ImageTextDataset, dim: int, device: torch.device, progress: bool):
        self.device, self.encode = device, encoder
        self.rows: Tensor | None = None
        lengths = dataset.token_lengths()
        if int(lengths.sum()) * dim * 2 > LIMIT_BYTES:
            return
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.rows = torch.empty(int(self.starts[-1]), dim, dtype=torch.bfloat16)
        order = np.argsort(lengths, kind="stable")  # batches of equal lengths: little padding
        for start in tqdm(range(0, len(order), 256), desc="encoding captions", unit="batch", disable=not progress, leave=False):
            batch = dataset.fetch(order[start : start + 256], pictures=False)
            features = encoder(batch.ids.to(device), batch.mask.to(device)).to("cpu", torch.bfloat16)
            for i, index in enumerate(batch.index.tolist()):
                self.rows[self.starts[index] : self.starts[index + 1]] = features[i, : lengths[index]]

    def __call__(self, batch: Batch, changed: Sequence[int] = ()) -> Tensor:
        """changed: rows whose captions are no longer those of the dataset."""
        if self.rows is None:
            return self.encode(batch.ids.to(self.device), batch.mask.to(self.device))
        out = torch.zeros(*batch.ids.shape, self.rows.shape[1], dtype=torch.bfloat16)
        for i, index in enumerate(batch.index.tolist()):
            rows = self.rows[self.starts[index] : self.starts[index + 1]]
            out[i, : len(rows)] = rows
        features = out.to(self.device).float()
        if changed:
            where = torch.tensor(changed)
            anew = self.encode(batch.ids[where].to(self.device), batch.mask[where].to(self.device))
            features[where.to(self.device)] = anew.to(torch.bfloat16).float()  # rounded as those in memory
        return features
