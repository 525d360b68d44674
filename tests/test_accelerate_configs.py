"""The configuration files for `accelerate launch`, read by Accelerate itself."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from hf_segvit.models.modeling_eomt import EoMTForUniversalSegmentation
from hf_segvit.training.recipe import RECIPE_FOLDER

FOLDER = Path(__file__).parents[1] / "training" / "accelerate"
TYPES = {
    "cpu": DistributedType.NO,
    "one_gpu_bf16": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "multi_machine_ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_all_files_are_known():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_it(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert config.distributed_type == TYPES[name]
    assert config.use_cpu is (name == "cpu")
    assert config.mixed_precision == ("bf16" if name in ("one_gpu_bf16", "fsdp2", "deepspeed_zero2") else "no")
    assert (config.num_processes > 1) is (TYPES[name] != DistributedType.NO)
    assert config.num_machines == (2 if name == "multi_machine_ddp" else 1)
    options = {action.dest for action in launch_command_parser()._actions}
    nested = {**config.fsdp_config, **config.deepspeed_config}
    assert set(nested) - options <= {"deepspeed_multinode_launcher"}, "every key is one of accelerate launch's"
    command = f"accelerate launch --config_file training/accelerate/{name}.yaml"
    assert command in path.read_text(), "its head has the command"


def test_fsdp_wraps_blocks_that_the_model_has():
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2
    wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert set(wrapped) <= set(EoMTForUniversalSegmentation._no_split_modules)


def test_commands_of_the_recipes_name_files_that_are_there():
    for path in RECIPE_FOLDER.glob("*.yaml"):
        for word in path.read_text().split():
            if word.startswith("training/accelerate/"):
                assert (FOLDER / Path(word).name).is_file(), f"{path.name}: {word}"
