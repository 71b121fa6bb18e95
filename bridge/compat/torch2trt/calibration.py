"""``torch2trt.calibration``, where older versions had what is in ``dataset_calibrator`` and ``dataset`` now."""

from .dataset import ListDataset, TensorBatchDataset
from .dataset_calibrator import DEFAULT_CALIBRATION_ALGORITHM, DatasetCalibrator

__all__ = ["DEFAULT_CALIBRATION_ALGORITHM", "DatasetCalibrator", "ListDataset", "TensorBatchDataset"]
