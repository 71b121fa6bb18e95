"""``torch2trt.dataset``."""

from bridge import Dataset, FolderDataset, ListDataset, TensorBatchDataset
from bridge.runtime.dataset import DatasetRecorder

__all__ = ["Dataset", "DatasetRecorder", "FolderDataset", "ListDataset", "TensorBatchDataset"]
