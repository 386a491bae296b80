"""What is wrong with an image, a compose file, a launcher's configuration or variables of cluster/, in words."""

import re
import shlex
from pathlib import Path

import jsonschema
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {
    "FROM",
    "RUN",
    "ENV",
    "WORKDIR",
    "COPY",
    "USER",
    "CMD",
    "EXPOSE",
    "ARG",
    "LABEL",
    "ENTRYPOINT",
    "VOLUME",
}
ASSIGNMENT = re.compile(r"^(#\s*)?([A-Z][A-Z0-9_]*)=(.*)$")
PLAIN = re.compile(r"^[A-Za-z0-9_.,:/^=-]+$")  # the same to a shell, to docker and to kubectl
# Names of NVIDIA's list (NCCL 2.32), of Google's plugin, of libfabric's fi_efa page and of PyTorch.
NCCL = """
ALGO BUFFSIZE COLLNET_ENABLE COMM_BLOCKING CROSS_NIC CUMEM_ENABLE DEBUG DEBUG_FILE DEBUG_SUBSYS DMABUF_ENABLE
GRAPH_REGISTER IB_ADDR_FAMILY IB_ADDR_RANGE IB_DISABLE IB_GID_INDEX IB_HCA IB_MERGE_NICS IB_PCI_RELAXED_ORDERING
IB_QPS_PER_CONNECTION IB_RETRY_CNT IB_ROCE_VERSION_NUM IB_SL IB_SPLIT_DATA_ON_QPS IB_TC IB_TIMEOUT IGNORE_CPU_AFFINITY
LAUNCH_MODE MAX_CTAS MAX_NCHANNELS MIN_CTAS MIN_NCHANNELS NET NET_GDR_LEVEL NET_GDR_READ NET_PLUGIN NET_SHARED_BUFFERS
NSOCKS_PERTHREAD NTHREADS NVB_DISABLE NVLS_ENABLE P2P_DISABLE P2P_LEVEL P2P_NET_CHUNKSIZE P2P_PXN_LEVEL PROTO
PXN_DISABLE SHM_DISABLE SOCKET_FAMILY SOCKET_IFNAME SOCKET_NTHREADS SOCKET_RETRY_CNT TOPO_FILE TUNER_PLUGIN
GPUDIRECTTCPX_CTRL_DEV GPUDIRECTTCPX_SOCKET_IFNAME GPUDIRECTTCPX_UNIX_CLIENT_PREFIX
"""
OTHERS = "GLOO_SOCKET_IFNAME FI_PROVIDER FI_EFA_USE_HUGE_PAGE FI_EFA_FORK_SAFE FI_EFA_USE_DEVICE_RDMA FI_LOG_LEVEL"
DOCUMENTED = {*OTHERS.split(), *("NCCL_" + name for name in NCCL.split())}
# EC2's RunInstances and Compute Engine's instances.insert, as far as the files use them.
MACHINE_FIELDS = {
    "aws": {
        *("InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings", "InstanceMarketOptions", "KeyName"),
        *("SubnetIds", "SecurityGroupIds", "NetworkInterfaces", "Placement", "TagSpecifications", "UserData"),
    },
    "gcp": {
        *("machineType", "disks", "scheduling", "guestAccelerators", "networkInterfaces", "metadata", "labels", "tags"),
        *("serviceAccounts", "minCpuPlatform", "shieldedInstanceConfig"),
    },
}


def pinned() -> dict[str, str]:
    """constraints.txt: version by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple([*line.split(maxsplit=1), ""][:2]) for line in joined.splitlines()]


def dockerfile_problems(text: str, ignored: str) -> list[str]:
    """Of a Dockerfile and the ignore file beside it."""
    found, steps = [], instructions(text)
    if not steps or steps[0][0] != "FROM":
        return ["starts with no FROM"]
    found += [f"{name}: no instruction" for name, _ in steps if name not in INSTRUCTIONS]
    copied = [source for name, said in steps if name == "COPY" for source in said.split()[:-1]]
    found += [f"COPY {source}: is not there" for source in copied if not (ROOT / source).exists()]
    lines = [line for line in ignored.splitlines() if line and not line.startswith("#")]
    if lines[:1] != ["*"] or {line[1:] for line in lines if line[0] == "!"} != {*copied}:
        found.append("the ignore file lets through other things than those that are copied")
    for name, version in re.findall(r"([A-Za-z0-9_.-]+)\[?[^\s=\]]*\]?==([0-9][^\s\"']*)", text):
        if pinned().get(name) != version:
            found.append(f"{name}=={version}: constraints.txt has {pinned().get(name)}")
    found += [f"python {other}: tested with 3.11" for other in re.findall(r"python:?(3\.\d+)", text) if other != "3.11"]
    installs = [said for name, said in steps if name == "RUN" and "pip install" in said]
    if not installs or any("--constraint" not in said for said in installs):
        found.append("pip installs without constraints.txt")
    if [said for name, said in steps if name == "USER"][-1:] in ([], ["0"], ["root"]):
        found.append("runs as root")
    return found


def compose_problems(compose: dict) -> list[str]:
    """By the Compose specification's schema, and by what refers to what."""
    schema = get_builtin_schema("vendor.compose-spec")
    validator = jsonschema.validators.validator_for(schema)(schema)
    found = [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(compose)]
    if found:
        return found
    for name, service in compose["services"].items():
        volumes = {volume.split(":")[0] for volume in service.get("volumes", [])}
        for kind, used in (("volumes", volumes), ("secrets", service["secrets"]), ("networks", service["networks"])):
            found += [f"{name}: no {kind} {missing}" for missing in sorted({*used} - compose[kind].keys())]
        found += [
            f"{name}: no service {other}" for other in {*service.get("depends_on", {})} - compose["services"].keys()
        ]
        found += [f"{name}: no {key}" for key in ("healthcheck", "restart") if key not in service]
    return found


def launcher_problems(config: dict) -> list[str]:
    """What Ray's own check of a cluster launcher's file (tests/system) does not see."""
    fields, found = MACHINE_FIELDS[config["provider"]["type"]], []
    for name, node in config["available_node_types"].items():
        found += [f"{name}: no machine has {key}" for key in sorted(node["node_config"].keys() - fields)]
    most = sum(node.get("max_workers", 0) for node in config["available_node_types"].values())
    if config["max_workers"] != most:
        found.append(f"max_workers: {config['max_workers']}, the node types add up to {most}")
    found += [f"file_mounts: no {source}" for source in config["file_mounts"].values() if not (ROOT / source).exists()]
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands"):
        if key not in config:
            found.append(f"{key}: not said, so that Ray's defaults install another Ray")
    for key, commands in config.items():
        for command in commands if key.endswith("commands") else []:
            if "#" in shlex.split(command, comments=False):
                found.append(f"{key}: a comment inside a command")
            if "apt-get install" in command and "apt-get update &&" not in command:
                found.append(f"{key}: apt-get installs from a list of packages that may be old or missing")
            if "pip install" in command and "--constraint" not in command:
                found.append(f"{key}: pip installs without constraints.txt")
    return found


def env_problems(text: str) -> list[str]:
    """Of a file that a shell sources and that docker and kubectl read; assignments in comments count."""
    found, names = [], []
    for number, line in enumerate(text.splitlines(), 1):
        assignment = ASSIGNMENT.match(line)
        if assignment:
            comment, name, value = assignment.groups()
            names += [] if comment else [name]
            found += [] if name in DOCUMENTED else [f"line {number}: {name} is documented nowhere"]
            found += [] if PLAIN.match(value) else [f"line {number}: {value!r} is not the same to every reader"]
        elif not line.startswith("# "):
            found.append(f"line {number}: neither an assignment nor a comment")
    return found + [f"{name}: said twice" for name in {*names} if names.count(name) > 1]
