"""What common devices can do, from their makers' data sheets; every figure can be overridden."""

from dataclasses import asdict, dataclass, replace

from flipkd_dist.errors import UserError

GIB = 2**30
DEFAULT = "h100-80gb"
USABLE = 0.9  # of the memory: the rest is the driver's context, the libraries' workspaces and fragmentation


@dataclass(frozen=True)
class Device:
    """Dense matrix products without sparsity; bandwidths in one direction."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float  # NVLink or PCIe, between the devices of a machine
    network_gb_s: float  # between machines, for each device
    per_machine: int = 8
    unpack_per_s: float | None = None  # four-bit weights a second; None: by memory bandwidth
    mfu: float = 0.4  # share of the peak that training reaches; peers publish 0.41 for LoRA of 8 B on one H100
    link_latency_s: float = 2e-6  # of one hop inside a machine: an assumption, as the next
    network_latency_s: float = 8e-6  # of one hop between machines

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    @property
    def usable_bytes(self) -> float:
        return self.memory_gib * GIB * USABLE

    def tflops(self, value_bytes: int) -> float:
        return self.bf16_tflops if value_bytes == 2 else self.fp32_tflops

    def wire_gb_s(self, num_workers: int) -> float:
        return self.link_gb_s if num_workers <= self.per_machine else min(self.link_gb_s, self.network_gb_s)

    def as_dict(self) -> dict:
        return asdict(self)


DEVICES = {
    device.name: device
    for device in (
        Device("a10", 24, 125, 31.2, 600, 32, 3),
        Device("a100-40gb", 40, 312, 19.5, 1555, 300, 25),
        Device("a100-80gb", 80, 312, 19.5, 2039, 300, 25),
        Device("h20", 96, 148, 44, 4000, 450, 50),
        Device("h100-80gb", 80, 989, 67, 3350, 450, 50),
        Device("h200", 141, 989, 67, 4800, 450, 50),
        Device("l40s", 48, 362, 91.6, 864, 32, 12.5),
        Device("rtx3090", 24, 71, 35.6, 936, 32, 3),
        Device("rtx4090", 24, 165, 82.6, 1008, 32, 3),
        # Two AVX2 cores; unpacking and products as measured on them, so that no share of a peak is assumed.
        Device("cpu", 24, 0.1, 0.1, 20, 5, 1, per_machine=64, unpack_per_s=1e8, mfu=1.0, link_latency_s=5e-5),
    )
}

# As NVIDIA's driver calls them; whatever differs by a letter (A10G, H100 PCIe, a MIG slice) is another device.
DRIVER_NAMES = {
    "NVIDIA A10": "a10",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA H20": "h20",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H200": "h200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def device_of_driver(name: str) -> Device | None:
    """The device that the driver calls `name`; None where its data sheet is not here."""
    return DEVICES.get(DRIVER_NAMES.get(name, ""))


def find_device(
    name: str, memory_gib: float | None = None, tflops: float | None = None, network_gb_s: float | None = None
) -> Device:
    """The named device with its figures overridden.

    Raises:
        UserError: no such device.
    """
    if name.lower() not in DEVICES:
        known = ", ".join(DEVICES)
        raise UserError(
            f"--device {name}: unknown: take one of {known}, and correct it with --device-memory, --tflops, --network"
        )
    device = DEVICES[name.lower()]
    if memory_gib is not None:
        device = replace(device, memory_gib=memory_gib)
    if tflops is not None:
        device = replace(device, bf16_tflops=tflops, fp32_tflops=tflops)
    if network_gb_s is not None:
        device = replace(device, network_gb_s=network_gb_s)
    return device
