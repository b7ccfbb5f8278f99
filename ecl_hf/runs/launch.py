"""Launches that would not do what was asked for."""

from collections.abc import Mapping

COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers say how many processes there are."""


def check_launch(environment: Mapping[str, str], processes: int) -> None:
    """See that as many processes train together as the launcher was asked for, and that none shards the model.

    Raises:
        ValueError: several processes were launched but each trains alone, one instead of several, or with sharding.
    """
    for name, title in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ValueError(
                f"{title} shards the weights, which momentum encoders must see whole: launch without it (several "
                "processes then train with DistributedDataParallel)"
            )
    launched = max(int(environment.get(name, 1)) for name in COUNTS)
    if launched != processes:
        raise ValueError(f"{launched} processes were launched, but each trains alone: set ACCELERATE_USE_CPU=true")
    # What `accelerate launch --cpu --num_processes N` leaves, which starts a single one
    left = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(environment)
    if left and not set(COUNTS) & set(environment):
        raise ValueError(
            "several processes were asked for, but accelerate launch started one; on CPUs start them with "
            "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node N training/train.py ..."
        )
