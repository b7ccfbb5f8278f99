"""`ecl-hf COMMAND ...`: the scripts of `training/`, from any folder.

ecl-hf train --recipe quickstart --output_dir runs/quickstart
ecl-hf train --num_processes 4 --recipe cifar100_lt --output_dir runs/c100      # through Accelerate's launcher
ecl-hf predict --run runs/quickstart
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import ecl_hf
from ecl_hf.terminal import refusing

COMMANDS = {
    "train": "train on a long-tailed data set, or on a folder of pictures",
    "evaluate": "test a trained model, with all metrics",
    "predict": "classify pictures",
    "weigh": "weigh a model's experts by unlabelled pictures",
    "export": "publish a model: Hub repository, timm, ONNX",
    "figures": "draw figures and a report of runs",
    "data": "make, verify and publish long-tailed splits",
    "reproduce": "run and render the paper's tables",
}
"""Each script of `training/` by its name, and what it is for."""

LAUNCHED = ("train", "evaluate")
"""Commands that several processes can share."""


def launcher() -> argparse.ArgumentParser:
    """The flags of `accelerate launch` that a training here can need; the names are Accelerate's."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("launch flags of train and evaluate, passed on to Accelerate")
    group.add_argument("--num_processes", type=int, metavar="N", help="processes in all: one for each GPU, or on CPUs")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="arithmetic of the forward passes")
    names = "multi_gpu, multi_node, one_gpu, cpu"
    group.add_argument("--config_file", metavar="FILE", help=f"of `accelerate config`, or one of {names}")
    group.add_argument("--gpu_ids", metavar="IDS", help="GPUs to use, as in 0,1")
    group.add_argument("--cpu", action="store_true", help="use no GPU")
    group.add_argument("--num_machines", type=int, metavar="N", help="machines that train together")
    group.add_argument("--machine_rank", type=int, metavar="N", help="which of them this is, from 0")
    group.add_argument("--main_process_ip", metavar="IP", help="address of machine 0")
    group.add_argument("--main_process_port", type=int, metavar="PORT", help="port on it")
    return parser


def find_launch_file(name: str) -> str:
    """A launch configuration by its path, or by the name of one that comes with the package."""
    known = files("ecl_hf.training") / "accelerate" / f"{name}.yaml"
    return str(known) if not Path(name).exists() and known.is_file() else name


def launch(script: Path, flags: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Start a script as `accelerate launch` does, and on CPUs several processes as `torchrun` does.

    If a process fails, the program ends with its exit code: 75 where a training was stopped in good order.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = {name: value for name, value in vars(flags).items() if value}
    if flags.config_file:
        given["config_file"] = find_launch_file(flags.config_file)
    else:
        given = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"} | given
    if flags.cpu or not (flags.config_file or torch.accelerator.is_available()):
        given = {"num_processes": 1} | given
        if given["num_processes"] > 1:  # on CPUs `accelerate launch` does this through MPI alone
            os.environ["ACCELERATE_USE_CPU"] = "true"
            given = {name: value for name, value in given.items() if name != "cpu"} | {"multi_gpu": True}
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    try:
        launch_command(launch_command_parser().parse_args([*options, str(script), *arguments]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script that the first argument names, with the arguments after it."""
    flags = launcher()
    commands = "\n".join(f"  {name:10} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ecl-hf",
        usage="ecl-hf COMMAND [flags]; ecl-hf COMMAND --help shows the flags",
        epilog=f"commands:\n{commands}\n\n{flags.format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ecl-hf {ecl_hf.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    given, rest = argparse.Namespace(), args.arguments
    if args.command in LAUNCHED:
        given, rest = flags.parse_known_args(args.arguments)
    if any(vars(given).values()):
        launch(Path(str(files("ecl_hf.training") / f"{args.command}.py")), given, rest)
        return
    sys.argv[0] = f"ecl-hf {args.command}"  # for messages about the flags
    with refusing():  # a package that one command alone needs
        script = importlib.import_module(f"ecl_hf.training.{args.command}")
    script.main(rest)


if __name__ == "__main__":
    main()
