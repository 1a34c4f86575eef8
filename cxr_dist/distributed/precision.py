"""Number formats and XLA: what `auto` means on these devices."""

from cxr_dist.config.schema import Config
from cxr_dist.distributed.devices import DeviceKind, _cpu_info


def resolve_precision(requested: str, kind: DeviceKind) -> str:
    """float32, bfloat16 or float16. `auto` takes what the device computes natively and faster.

    A CPU without bfloat16 instructions emulates them: a ResNet50 forward pass then takes 1.4 times as
    long as in float32 (measured on a Zen 3 CPU with oneDNN off), where one with AVX512_BF16 needs half the time.
    """
    if requested != "auto":
        return requested
    if kind == "CPU":
        return "bfloat16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "float32"
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    major = details.get("compute_capability", (0, 0))[0]
    # Tensor cores: float16 from Volta (7) on, bfloat16, which needs no loss scale, from Ampere (8) on.
    return "bfloat16" if major >= 8 else "float16" if major >= 7 else "float32"


def resolve_xla(config: Config) -> bool:
    """Whether forward and backward pass are compiled with XLA.

    `auto` compiles nowhere. On CPUs XLA was between 3 % faster (frozen base) and 17 % slower (upper 100 layers), and
    costs half a minute of compilation (Zen 3, oneDNN off). On a GPU compilation took over six minutes
    (docs/decisions/0026-what-a-gpu-step-needs.md).
    """
    return config.xla == "on"


def resolve_fused_batch_norm(config: Config, kind: DeviceKind) -> bool:
    """Whether BatchNorm that trains is one operation; `auto` says so of GPUs, where memory is what it costs."""
    if config.model.fused_batch_norm != "auto":
        return config.model.fused_batch_norm == "on"
    return kind == "GPU" and not config.model.synchronize_batch_norm


def dtype_policy(precision: str) -> str:
    """Keras's name for the policy: variables in float32, arithmetic in `precision`."""
    return "float32" if precision == "float32" else f"mixed_{precision}"


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_info("flags").split())
