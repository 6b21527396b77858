"""The framework: imported on a backend that is supported, and kept from its user's own settings.

Keras has settings of the user's, in `~/.keras/keras.json`, in variables and in
a caller's global policy, that change what the same layers compute. None of
them is part of a fingerprint or of a run's settings, so none may decide a
number: `pinned_framework` holds them at Keras's own defaults.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import xxhash

from featstore.errors import UsageError
from featstore.pinned import Outermost, setting
from featstore.progress import bars, working

BACKENDS = ("tensorflow", "jax")
INTRAOP_THREADS = "TF_NUM_INTRAOP_THREADS"
# On a GPU: kernels that give the same bits each time. XLA then chooses them by rule instead of by
# trying some out, which is most of the time that it compiles (docs/ACCELERATOR.md).
DETERMINISTIC = "xla_gpu_deterministic_ops"
COMPILED_BYTES, COMPILED_SECONDS = 1 << 30, 0.2
"""Most bytes of compiled programs that are kept, and from how long a compilation on."""
# Earlier ones print an error for each program that they read on a processor with AVX-512, though it
# is as good (https://github.com/openxla/xla/issues/44565).
SILENT_JAXLIB = (0, 10, 2)
_CHOOSE = "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax"


def import_framework() -> str:
    """Import Keras and keras-hub on the backend that is configured.

    The lines that compiled code prints at start are kept from stderr, unless the import fails.

    Returns:
        The backend: "tensorflow" or "jax".

    Raises:
        UsageError: Another backend is configured, its package is missing, or
            Keras refuses the user's settings.
    """
    _have_same_bits()
    chosen = os.environ.get("KERAS_BACKEND", "")
    loaded = "keras" in sys.modules
    # Asked before Keras is imported, which fails on a backend whose package is missing.
    if chosen and chosen not in BACKENDS:
        raise UsageError(f"KERAS_BACKEND={chosen}: not a backend that is supported; {_CHOOSE}")
    try:
        with contextlib.nullcontext() if loaded else _first_import():
            import keras
            import keras_hub  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Keras cannot be imported on the backend {chosen or 'of ' + _settings_file()}"
            f" ({_first_line(error)}); install what is missing, or {_CHOOSE}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        # What it does with a value that it does not take.
        raise UsageError(
            f"Keras refuses its settings ({_first_line(error)}); mend"
            f" {_settings_file()} or the variables KERAS_*"
        ) from error
    backend = str(keras.backend.backend())
    if backend not in BACKENDS:
        where = "Keras is loaded, and its" if loaded else f"{_settings_file()}:"
        raise UsageError(f"{where} backend {backend} is not supported; {_CHOOSE}")
    if keras.config.is_nnx_enabled():
        raise UsageError("Keras's NNX mode is not supported; set KERAS_NNX_ENABLED=false")
    if backend == "jax":
        _keep_compiled()
    return backend


def _have_same_bits() -> None:
    """Have XLA use deterministic kernels, unless the user's `XLA_FLAGS` say about it.

    XLA takes what does not begin with a dash for the name of a file that has the flags.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if flags.strip() and not flags.lstrip().startswith("-"):
        try:
            with open(flags, encoding="utf-8") as file:
                flags = file.read().strip()
        except (OSError, ValueError):
            # XLA says what is wrong with it.
            return
    if DETERMINISTIC not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{DETERMINISTIC}=true".lstrip()


@functools.cache
def _keep_compiled() -> None:
    """Have JAX keep what it compiles in the user's cache folder, if that can be written.

    The next process, a search's worker say, reads it in place of compiling for seconds. It is kept
    by the kind of processor, for homes that several machines share.
    `JAX_COMPILATION_CACHE_DIR` is the user's choice of another folder.

    No device is asked for: a process that computes nothing, such as a search's driver, would
    keep most of a GPU's memory from those that do.
    """
    import jax
    import jaxlib.version

    kind = processor()
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
    if not kind or not os.path.isabs(home) or jax.config.jax_compilation_cache_dir:
        return
    release = tuple(int(part) for part in re.findall(r"\d+", jaxlib.version.__version__)[:3])
    if release < SILENT_JAXLIB and os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") < "3":
        return
    folder = os.path.join(home, "featstore", "jax", kind)
    if _takes_files(folder):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", COMPILED_SECONDS)


def _takes_files(folder: str) -> bool:
    """Make JAX's cache folder; say whether files can be written there, else JAX warns each time.

    Of a program whose writing was cut off there is no second file, with the time of its use. JAX
    would warn of it for ever, and never replace it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        # Which JAX locks by, and may be another user's.
        with open(os.path.join(folder, ".lockfile"), "ab"), tempfile.TemporaryFile(dir=folder):
            pass
        names = set(os.listdir(folder))
        for name in names:
            if name.endswith("-cache") and f"{name.removesuffix('-cache')}-atime" not in names:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
    except OSError:
        return False
    return True


_own_process = False


def in_own_process() -> None:
    """Say that this process is a command or a worker: there are no objects of a caller in it.

    Python then never looks for circles among what there is once Keras is imported, and would find
    none of a caller's.
    """
    global _own_process
    _own_process = True


def processor() -> str:
    """Return a name for what this processor can run; "" where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            about = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        return ""
    return f"cpu-{xxhash.xxh3_64_hexdigest(''.join(sorted(about)).encode())}" if about else ""


def no_device(error: BaseException) -> UsageError | None:
    """Return the error that JAX cannot use the device that it is to use, if that is what it says.

    Args:
        error: Of the first computation.
    """
    said = _first_line(error)
    if not isinstance(error, RuntimeError) or "nable to initialize backend" not in said:
        return None
    return UsageError(
        f"JAX finds no device ({said}); set JAX_PLATFORMS=cpu, or install JAX for your accelerator"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _settings_file() -> str:
    home = os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")
    return os.path.join(home, "keras.json")


@contextlib.contextmanager
def _first_import() -> Iterator[None]:
    # Keras imports it too; this import says nothing where a notebook has no widgets.
    bars()
    with (
        working("loading Keras"),
        _plain_environment(),
        _without_jax(),
        _without_start_lines(),
        _without_collecting(),
    ):
        yield


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Have Python look for no circles among what is imported, nor later in a process of ours.

    It stays, and looking takes a fifth of the time in which Keras is imported.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if _own_process:
            gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_start_lines() -> Iterator[None]:
    """Keep from stderr what is printed, by compiled code too; show it where an error ends it."""
    try:
        kept = os.dup(2)
    except OSError:
        # There is no stderr.
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except (ImportError, ValueError, TypeError, AttributeError):
            # Said in one line.
            raise
        except Exception:
            hidden.seek(0)
            os.write(kept, hidden.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def _without_jax() -> Iterator[None]:
    """Keep TensorFlow's converter from importing JAX, where that is installed but not the backend.

    It takes a tenth of the time in which Keras is imported.
    """
    settings = os.path.expanduser(_settings_file())
    backend = os.environ.get("KERAS_BACKEND", "")
    with contextlib.suppress(OSError, ValueError), open(settings, encoding="utf-8") as file:
        backend = backend or file.read()
    # Keras's other backends import it themselves.
    if "jax" in sys.modules or (backend and "tensorflow" not in backend):
        yield
        return
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["jax"]


@contextlib.contextmanager
def _plain_environment() -> Iterator[None]:
    """Keep away what decides while Keras is imported, and cannot be put right after."""
    # NNX: another class of layers and variables. Legacy Keras: TensorFlow's own `tf.keras` would be
    # another package, which keras-hub's tokenizers do not know.
    ours = {"KERAS_NNX_ENABLED": "false", "TF_USE_LEGACY_KERAS": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def pinned_framework() -> Iterator[None]:
    """Compute as Keras does by default, whatever its user's file or a caller has set.

    Held: `floatx` float32, `epsilon` 1e-7, `image_data_format` channels_last,
    the dtype policy float32, flash attention as Keras chooses, no distribution;
    on TensorFlow traced functions, and float32 products without TF32; on JAX
    32-bit types, float32 products in full, and its own rules of promotion.
    Everything is put back at the end. While it lasts, other threads of the
    process see the settings that are the process's own (the first three, and
    TensorFlow's).

    Also a decorator: `@pinned_framework()`. Cheap enough for each batch.

    Raises:
        UsageError: As `import_framework`; or JAX cannot use the device that it is to use.
    """
    import_framework()
    # The policy first: where none is set, Keras reads it from `floatx`.
    with _OF_THREAD, _OF_PROCESS:
        try:
            yield
        except RuntimeError as error:
            if refused := no_device(error):
                raise refused from error
            raise


def limit_threads(of_one: int, side_by_side: int = 0) -> None:
    """Have TensorFlow compute with so many threads; 0: with as many as it takes.

    Nothing is changed in a process that has computed already. What its user's environment says
    (`TF_NUM_INTRAOP_THREADS`) wins, but over a share of the cores, for which both are given.

    Args:
        of_one: Threads that share one operation.
        side_by_side: Operations that run at a time.
    """
    if not of_one or import_framework() != "tensorflow":
        return
    if not side_by_side and INTRAOP_THREADS in os.environ:
        return
    import tensorflow as tf

    # Refused once TensorFlow computes, as in a worker that is used again.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(of_one)
        tf.config.threading.set_inter_op_parallelism_threads(side_by_side)


def threads_of_operation() -> int:
    """Return how many threads TensorFlow has compute one operation; 0: as many as it takes."""
    if import_framework() != "tensorflow":
        return 0
    import tensorflow as tf

    set_here = tf.config.threading.get_intra_op_parallelism_threads()
    return int(set_here or os.environ.get(INTRAOP_THREADS) or 0)


def open_device() -> None:
    """Have JAX open its device now, for a process that will compute.

    Raises:
        UsageError: As `pinned_framework`.
    """
    with pinned_framework():
        if import_framework() == "jax":
            import jax

            jax.default_backend()


def _of_thread() -> AbstractContextManager[Any]:
    import keras

    # A policy that was never set stays so; Keras's public function would set it.
    from keras.src.backend.common import global_state

    def attribute(name: str, value: Any) -> AbstractContextManager[None]:
        return setting(
            lambda: global_state.get_global_attribute(name),
            lambda new: global_state.set_global_attribute(name, new),
            value,
        )

    with ExitStack() as stack:
        stack.enter_context(attribute("dtype_policy", keras.DTypePolicy("float32")))
        stack.enter_context(attribute("flash_attention", None))
        stack.enter_context(attribute("distribution", None))
        if keras.backend.backend() == "jax":
            import jax

            # Of `jax.experimental` in older releases.
            x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
            stack.enter_context(x64(False))
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        return stack.pop_all()


def _of_process() -> AbstractContextManager[Any]:
    import keras

    config = keras.config
    held = [
        (config.floatx, config.set_floatx, "float32"),
        (config.epsilon, config.set_epsilon, 1e-7),
        (config.image_data_format, config.set_image_data_format, "channels_last"),
    ]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf32 = tf.config.experimental
        held += [
            (tf32.tensor_float_32_execution_enabled, tf32.enable_tensor_float_32_execution, False),
            (tf.config.functions_run_eagerly, tf.config.run_functions_eagerly, False),
        ]
    with ExitStack() as stack:
        for read, write, value in held:
            stack.enter_context(setting(read, write, value))
        return stack.pop_all()


_OF_THREAD, _OF_PROCESS = Outermost(_of_thread, of_thread=True), Outermost(_of_process)
