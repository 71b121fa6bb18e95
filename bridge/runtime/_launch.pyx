# cython: language_level=3
"""The usual call of a TRTModule, compiled: inputs are checked, TensorRT is told of new addresses, the run is enqueued.

TensorRT's launch of an engine runs through so much of the driver's code that everything else is out of the processor's
caches afterwards, and the interpreter's way through a few functions takes tens of microseconds then. What is here is
what ``context`` and ``graphs`` do in a call that is like the one before it. In any other case ``launched`` does nothing
and returns NotImplemented, and Python makes the whole call, with all checks and their words.

Tensors are read through DLPack's C exchange API, a stable interface: nothing is compiled against torch, or linked to
it.
"""

cimport cython
from cpython.dict cimport PyDict_Size
from cpython.exc cimport PyErr_Clear
from cpython.list cimport PyList_GET_SIZE
from cpython.long cimport PyLong_AsVoidPtr, PyLong_FromVoidPtr
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.tuple cimport PyTuple_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

import time
import weakref

import torch

cdef extern from "Python.h":
    PyObject **PySequence_Fast_ITEMS(object sequence)
    Py_ssize_t PySequence_Fast_GET_SIZE(object sequence)

# DLPack 1, as far as it is used (https://dmlc.github.io/dlpack/latest/c_api.html)

cdef struct Device:
    int32_t kind
    int32_t index

cdef struct DataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct View:
    char *data
    Device device
    int32_t axes
    DataType dtype
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset

cdef struct ExchangeApi:
    uint32_t major
    uint32_t minor
    void *previous
    void *allocate
    void *from_object
    void *to_object
    int (*view)(PyObject *tensor, View *out) noexcept
    void *current_stream

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(f"torch {torch.__version__} is without DLPack's C exchange API")

cdef const ExchangeApi *api = <const ExchangeApi *>PyCapsule_GetPointer(
    torch.Tensor.__dlpack_c_exchange_api__, "dlpack_exchange_api"
)
if api.major != 1 or api.view == NULL:
    raise ImportError(f"torch {torch.__version__} has version {api.major} of DLPack's exchange API, not 1")

cdef enum:
    MOST_AXES = 8
    FIRST_FLOAT = 2  # of DLPack's codes: 0 and 1 are integers
    MOST_NARROWED = 8  # narrowing.MOST
    THREADS = 256  # narrowing.THREADS

# CUDA's cuLaunchKernel, and what narrowing.py's kernel is given of each input

ctypedef int (*LaunchKernel)(
    void *kernel, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z, unsigned threads_x, unsigned threads_y,
    unsigned threads_z, unsigned shared, void *stream, void **arguments, void **more,
) noexcept nogil

cdef struct Narrowed:
    char *to
    char *address
    int64_t count
    uint64_t is_float

cdef struct Expected:
    # An input as it was in the call that armed the launch.
    char *address
    bint moved  # so that TensorRT, or the stream, is to be told of the address
    bint other  # than the tensor whose memory the stream keeps
    Device device
    DataType dtype
    int32_t axes
    bint copied  # into a buffer, since it is not as TensorRT reads it
    bint narrowed  # of 64 bits, in a buffer of 32
    char *buffer
    int64_t shape[MOST_AXES]

cdef object tensor_type = torch.Tensor
cdef object foreach_copy = torch._foreach_copy_
cdef object is_neg = torch.Tensor.is_neg


cdef inline bint is_contiguous(const View *view) noexcept:
    cdef int64_t expected = 1
    cdef int32_t axis
    if view.strides == NULL:
        return True
    for axis in range(view.axes - 1, -1, -1):
        if view.shape[axis] != 1:
            if view.strides[axis] != expected:
                return False
            expected *= view.shape[axis]
    return True


cdef inline bint read(PyObject *tensor, View *view) noexcept:
    """Where a plain tensor is, and of what shape; False where it has no memory of its own, or is of another class."""
    if type(<object>tensor) is not tensor_type:
        return False
    if api.view(tensor, view) != 0:
        PyErr_Clear()  # Python's way through the call says what is wrong with it
        return False
    view.data += view.byte_offset
    return view.data != NULL and view.axes <= MOST_AXES


cdef inline bint is_like(const Expected *expected, const View *view) noexcept:
    return (
        view.axes == expected.axes
        and view.dtype.code == expected.dtype.code
        and view.dtype.bits == expected.dtype.bits
        and view.dtype.lanes == expected.dtype.lanes
        and view.device.kind == expected.device.kind
        and view.device.index == expected.device.index
        and memcmp(view.shape, expected.shape, view.axes * sizeof(int64_t)) == 0
        and (expected.copied or is_contiguous(view))
    )


cdef class Launch:
    """A run that can be repeated, by the thread that armed it. Its context disarms it before anything else changes."""

    cdef object __weakref__
    cdef object stream_now, device_now, index, capturing  # functions, and the GPU's number
    cdef object handle, stream  # of the stream that is followed
    cdef list held  # of each input, a weak reference to the tensor whose memory the stream keeps
    cdef list buffers  # that those inputs are copied to which are not as TensorRT reads them
    cdef Expected *expected
    cdef Py_ssize_t size
    cdef bint armed, used, busy
    cdef LaunchKernel launch_kernel
    cdef void *kernel  # NULL where torch alone copies
    cdef void *on_stream  # handle

    def __dealloc__(self):
        PyMem_Free(self.expected)

    def __init__(self, tuple surroundings):
        self.index, self.stream_now, self.device_now, self.capturing, kernel = surroundings
        if kernel is not None:
            self.launch_kernel = <LaunchKernel>PyLong_AsVoidPtr(kernel[0])
            self.kernel = PyLong_AsVoidPtr(kernel[1])

    def disarm(self):
        """From now on calls are Python's. Returns whether one was made here, so that Python does not know the addresses
        that TensorRT has."""
        used, self.armed, self.used = self.used, False, False
        return used

    def retire(self):
        """``disarm``, from another thread: waits for a call that is under way."""
        self.armed = False
        while self.busy:
            time.sleep(0)

    cdef bint expect(self, inputs, list buffers, handle, stream) except -1:
        """Takes the inputs of a run, a list or tuple, for what comes next; False where that cannot be repeated here."""
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(f"inputs: a {type(inputs).__name__}, where a list or tuple belongs")
        cdef PyObject **tensors = PySequence_Fast_ITEMS(inputs)
        cdef Expected *expected
        cdef View view, into
        cdef Py_ssize_t place
        self.armed = False
        PyMem_Free(self.expected)
        self.size = PySequence_Fast_GET_SIZE(inputs)
        self.expected = <Expected *>PyMem_Calloc(self.size + 1, sizeof(Expected))
        if self.expected == NULL:
            raise MemoryError()
        for place in range(self.size):
            expected = &self.expected[place]
            if not read(tensors[place], &view):
                return False
            expected.address, expected.device, expected.dtype = view.data, view.device, view.dtype
            expected.axes, expected.copied = view.axes, buffers[place] is not None
            memcpy(expected.shape, view.shape, view.axes * sizeof(int64_t))
            if not is_like(expected, &view):
                return False
            if expected.copied and read(<PyObject *>buffers[place], &into):
                expected.buffer = into.data
                expected.narrowed = (
                    view.dtype.bits == 64
                    and into.dtype.bits == 32
                    and view.dtype.code == into.dtype.code
                    and view.dtype.code <= FIRST_FLOAT
                )
        self.buffers, self.held = [buffer for buffer in buffers if buffer is not None], [None] * self.size
        self.handle, self.stream, self.on_stream = handle, stream, PyLong_AsVoidPtr(handle)
        return True

    cdef list run(self, inputs):
        """The outputs; None, with nothing done, where the call is not like the one that armed this."""
        cdef PyObject **tensors = PySequence_Fast_ITEMS(inputs)
        cdef Expected *expected
        cdef View view
        cdef Py_ssize_t place
        cdef bint narrowed = self.kernel != NULL
        cdef list outputs
        if not self.armed or self.busy or PySequence_Fast_GET_SIZE(inputs) != self.size:
            return None
        for place in range(self.size):
            expected = &self.expected[place]
            if not read(tensors[place], &view) or not is_like(expected, &view):
                return None
            if expected.copied and view.dtype.code >= FIRST_FLOAT and (<object>tensors[place]).requires_grad:
                return None
            if expected.copied and not (expected.narrowed and is_contiguous(&view)):
                narrowed = False
            expected.moved = expected.moved or view.data != expected.address
            expected.address = view.data
            held = self.held[place]
            expected.other = expected.moved or held is None or held() is not <object>tensors[place]
            if expected.other and is_neg(<object>tensors[place]):  # what is in memory has the other sign
                return None
        if self.device_now is not None and self.device_now() != self.index:
            return None
        if self.stream_now(self.index) != self.handle or self.capturing():
            return None
        self.busy = self.used = True
        try:
            outputs = self.enqueue(tensors, narrowed)
            if outputs is not None:  # while the GPU is at work
                for place in range(self.size):
                    self.hold(place, <object>tensors[place])
            return outputs
        except BaseException:
            self.armed = False
            raise
        finally:
            self.busy = False

    cdef list enqueue(self, PyObject **tensors, bint narrowed):
        raise NotImplementedError

    cdef int copy_in(self, PyObject **tensors, bint narrowed) except -1:
        """Fills the buffers, by one launch of a kernel where there are several; ``narrowed``: the bridge's own can."""
        cdef Py_ssize_t place
        if PyList_GET_SIZE(self.buffers) and not (narrowed and self.narrow()):
            given = [<object>tensors[place] for place in range(self.size) if self.expected[place].copied]
            if PyList_GET_SIZE(given) == 1:
                self.buffers[0].copy_(given[0], True)
            else:
                foreach_copy(self.buffers, given, True)
        return 0

    cdef bint narrow(self) noexcept:
        """False, with nothing done, where there are too many inputs for it, or CUDA refuses."""
        cdef Narrowed inputs[MOST_NARROWED]
        cdef void *arguments = inputs
        cdef Expected *expected
        cdef Py_ssize_t place
        cdef int32_t axis
        cdef unsigned count = 0
        cdef int64_t most = 0
        cdef int refused
        for place in range(self.size):
            expected = &self.expected[place]
            if expected.copied:
                if count == MOST_NARROWED:
                    return False
                given = &inputs[count]
                given.to, given.address, given.count = expected.buffer, expected.address, 1
                for axis in range(expected.axes):
                    given.count *= expected.shape[axis]
                given.is_float = expected.dtype.code == FIRST_FLOAT
                most = max(most, given.count)
                count += 1
        with nogil:
            refused = self.launch_kernel(
                self.kernel, <unsigned>((most + THREADS - 1) // THREADS), count, 1, THREADS, 1, 1, 0, self.on_stream,
                &arguments, NULL,
            )
        return refused == 0

    cdef int hold(self, Py_ssize_t place, tensor) except -1:
        """Keeps the memory of an input until the stream is done with it."""
        if self.expected[place].other:
            tensor.record_stream(self.stream)
            self.held[place] = weakref.ref(tensor)
            self.expected[place].moved = False
        return 0


@cython.final
cdef class ContextLaunch(Launch):
    """The enqueue of an execution context."""

    cdef object execute, set_address, refill, restore
    cdef list names, output_names
    cdef list ready  # of each output: the tensors of coming calls, with their addresses; the last is the next one
    cdef list told  # of each output: the address that TensorRT has

    def __init__(self, tuple surroundings, execute, set_address, refill, restore):
        """``refill``: a weak reference to what makes coming calls' tensors for an output, by its place, and returns
        them; None without memory. ``restore``: to other types, from a list of outputs to one; None where these are the
        module's."""
        super().__init__(surroundings)
        self.execute, self.set_address, self.refill, self.restore = execute, set_address, refill, restore

    def arm(self, inputs, list buffers, handle, stream, list names, outputs):
        """After a run with these inputs, when TensorRT was told of the outputs of the next one."""
        if self.expect(inputs, buffers, handle, stream) and all(ready for _, ready in outputs):
            self.names = names
            self.output_names, self.ready = [name for name, _ in outputs], [ready for _, ready in outputs]
            self.told = [ready[-1][1] for ready in self.ready]
            self.armed = True

    cdef list enqueue(self, PyObject **tensors, bint narrowed):
        cdef Py_ssize_t place
        cdef Expected *expected
        cdef list outputs = [], made
        self.copy_in(tensors, narrowed)
        for place in range(self.size):
            expected = &self.expected[place]
            if expected.moved and not expected.copied:
                self.set_address(self.names[place], PyLong_FromVoidPtr(expected.address))
        if not self.execute(self.handle):  # once more in Python, which says why
            self.armed = False
            return None
        for place in range(PyList_GET_SIZE(self.ready)):  # while the GPU is at work
            made = self.ready[place]
            output, _ = made.pop()
            outputs.append(output)
            if not made:
                refill = self.refill()
                made = refill(place) if refill is not None else None
                if made is None:
                    self.armed = False
                    continue
                self.ready[place] = made
            address = (<tuple>made[-1])[1]
            if address != self.told[place]:
                self.set_address(self.output_names[place], address)
                self.told[place] = address
        return outputs if self.restore is None else self.restore(outputs)


@cython.final
cdef class GraphLaunch(Launch):
    """The replay of a CUDA graph, with copies of all inputs before it, and of the outputs behind it."""

    cdef object replay, copies

    def __init__(self, tuple surroundings, replay, copies):
        """``copies``: functions that return the outputs' copies."""
        super().__init__(surroundings)
        self.replay, self.copies = replay, copies

    def arm(self, inputs, list buffers, handle, stream):
        """After a replay with these inputs."""
        self.armed = self.expect(inputs, buffers, handle, stream)

    cdef list enqueue(self, PyObject **tensors, bint narrowed):
        self.copy_in(tensors, narrowed)
        self.replay()
        return [copy() for copy in self.copies]


@cython.final
cdef class Launches:
    """A module's: one of each thread, and what stands between a call's arguments and the engine's tensors."""

    cdef tuple hooks, names
    cdef object take, unflatten, tracing
    cdef bint by_name
    cdef dict of_thread

    def __init__(self, tuple hooks, take, unflatten, bint by_name, tuple names, tracing):
        """``hooks``: dicts that are empty where a call is the engine's run and nothing else. ``take``: from arguments
        to a list of tensors, or None; without it they are tensors. ``by_name``: whether it takes a dict of them, by name;
        ``names``: of those that may be given by name where it does not, in order; None where none may. ``unflatten``:
        from a list of tensors to what the module returns. ``tracing``: None while torch does not record what is called.
        """
        self.hooks, self.take, self.unflatten, self.by_name, self.tracing = hooks, take, unflatten, by_name, tracing
        self.names, self.of_thread = names, {}

    cdef tuple in_order(self, tuple args, dict kwargs):
        """The arguments, some of which are given by name; None where one is missing, or unknown."""
        cdef Py_ssize_t place
        if self.names is None or PyTuple_GET_SIZE(args) + PyDict_Size(kwargs) != PyTuple_GET_SIZE(self.names):
            return None
        for place in range(PyTuple_GET_SIZE(args), PyTuple_GET_SIZE(self.names)):
            if self.names[place] not in kwargs:
                return None
        return args + tuple([kwargs[name] for name in self.names[PyTuple_GET_SIZE(args):]])

    def put(self, Launch launch):
        """The calling thread's from now on."""
        for thread, reference in list(self.of_thread.items()):
            if reference() is None:  # the thread has ended
                self.of_thread.pop(thread, None)
        self.of_thread[PyThread_get_thread_ident()] = weakref.ref(launch)


def launched(Launches launches, tuple args, dict kwargs):
    """What the module returns; NotImplemented where this is not the call that was made before."""
    cdef Launch launch
    cdef list outputs
    reference = launches.of_thread.get(PyThread_get_thread_ident())
    if reference is None:
        return NotImplemented
    launch = reference()
    if launch is None:
        return NotImplemented
    for hooks in launches.hooks:
        if PyDict_Size(hooks):
            return NotImplemented
    given = args
    if launches.by_name:
        if args:
            return NotImplemented
        given = kwargs
    elif kwargs:
        given = launches.in_order(args, kwargs)
        if given is None:
            return NotImplemented
    if launches.take is not None:
        given = launches.take(given)
        if type(given) is not list:  # None, of arguments of another structure
            return NotImplemented
    outputs = launch.run(given)
    if outputs is None or launches.tracing() is not None:  # Python says what is wrong with that
        return NotImplemented
    return launches.unflatten(outputs) if launches.unflatten is not None else outputs[0]
