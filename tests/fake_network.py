"""A stand-in for what TensorRT's Python module has of a parsed network: tensors, layers, and the types of both."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LayerType = enum.Enum(
    "LayerType",
    "ACTIVATION ATTENTION_INPUT CAST CONSTANT CONVOLUTION DECONVOLUTION DEQUANTIZE EINSUM ELEMENTWISE FULLY_CONNECTED "
    "GATHER IDENTITY MATRIX_MULTIPLY PLUGIN_V2 QUANTIZE REDUCE SCALE SHAPE SHUFFLE SOFTMAX TOPK",
)
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL INT64 BF16 FP8 INT4")
MatrixOperation = enum.Enum("MatrixOperation", "NONE TRANSPOSE VECTOR")
float32, float16, bfloat16, int8, int32, bool = (
    DataType.FLOAT,
    DataType.HALF,
    DataType.BF16,
    DataType.INT8,
    DataType.INT32,
    DataType.BOOL,
)


@dataclass
class Tensor:
    name: str
    dtype: DataType = DataType.FLOAT
    shape: Sequence[int] = (1,)
    is_shape_tensor: Any = False


class ILayer:
    """Made with whatever attributes its class has in TensorRT; which class, a program says by assigning one."""

    def __init__(
        self, kind: str, name: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], **attributes: Any
    ) -> None:
        self.type, self.name = LayerType[kind], name
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
        self.output_types: dict[int, DataType] = {}
        self._precision: DataType | None = None
        vars(self).update(attributes)

    def get_input(self, index: int) -> Tensor | None:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    @property
    def precision(self) -> DataType:
        return self._precision or DataType.FLOAT

    @precision.setter
    def precision(self, dtype: DataType) -> None:
        self._precision = dtype

    @property
    def precision_is_set(self) -> Any:
        return self._precision is not None

    def reset_precision(self) -> None:
        self._precision = None

    def set_output_type(self, index: int, dtype: DataType) -> None:
        self.output_types[index] = dtype

    def reset_output_type(self, index: int) -> None:
        self.output_types.pop(index, None)


class IConvolutionLayer(ILayer): ...


class IDeconvolutionLayer(ILayer): ...


class IMatrixMultiplyLayer(ILayer): ...


class IFullyConnectedLayer(ILayer): ...


class IEinsumLayer(ILayer): ...


@dataclass
class Network:
    inputs: list[Tensor]
    layers: list[ILayer] = field(default_factory=list)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]

    def __getitem__(self, index: int) -> ILayer:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)
