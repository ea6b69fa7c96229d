"""model → fit: which number type the network computes in, here, on this processor."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from medtl_dist.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A resolved choice: ``name`` is fp32, bf16 or fp16; ``note`` says what the reader of the results should know."""

    name: str
    device_type: str
    note: str | None = None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=_DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:  # pyright: ignore[reportPrivateImportUsage]
        """Loss scaling, in effect for fp16 only: its smallest gradients would underflow."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")  # pyright: ignore[reportPrivateImportUsage]


def resolve(precision: str, device: torch.device) -> Precision:
    """What ``train.precision`` means on this device.

    Raises:
        UserError: fp16 on a CPU (its convolutions are slow and its scaler unneeded: bf16 or fp32 serve there).
    """
    native = native_bf16(device)
    if precision == "auto":
        if native:
            return Precision("bf16", device.type)
        if device.type == "cuda":
            return Precision("fp16", device.type)
        return Precision("fp32", device.type, "this processor has no bf16 arithmetic: computed in fp32")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision = fp16 needs a GPU; on a CPU use bf16, fp32 or auto.")
    if precision == "bf16" and not native:
        return Precision("bf16", device.type, "this processor emulates bf16: correct, but slower than fp32")
    return Precision(precision, device.type)


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
