"""``torch2trt.dataset_calibrator``."""

from .gone import CALIBRATOR, gone

DEFAULT_CALIBRATION_ALGORITHM = "ENTROPY_CALIBRATION_2"
DatasetCalibrator = gone("DatasetCalibrator", CALIBRATOR)

__all__ = ["DEFAULT_CALIBRATION_ALGORITHM", "DatasetCalibrator"]
