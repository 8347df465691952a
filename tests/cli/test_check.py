"""What cannot work is refused with a sentence, before anything is started."""

import pytest

from lightning_lss.cli.check import check
from tests.cli.composing import composed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seq_len=4098"], "A sequence of length 4098 cannot be split over 2 ranks"),
        (["devices=3", "sequence_parallel_size=2"], "sequence_parallel_size=2 does not divide the world size 3"),
        (["strategy.layout=spiral"], "layout='spiral' is unknown"),
        (["strategy.layout=null"], "layout=None is unknown"),
        (["strategy.layout=autos"], "layout='autos' is unknown"),
        (["strategy=megatron", "devices=4"], "num_heads=2"),
        (["strategy=ddp", "sequence_parallel_size=2"], "use strategy=lss"),
        (["strategy=single", "devices=2"], "strategy=single has one process, not devices=2"),
        (["mode=test"], "mode=test needs a trained model"),
        (["mode=train"], "mode=train is unknown"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist"),
        (["strategy=single", "devices=1", "ckpt_path=."], "is a folder, and this strategy reads files"),
        (["model=huggingface"], "model.path is not set: add model.path="),
        (["model=huggingface", "strategy=megatron"], "use strategy=lss or strategy=lss_fsdp"),
        (["model=huggingface", "mode=plan", "hardware=cpu"], "plan a model of its sizes"),
        (["mode=plan"], "add hardware=cpu"),
        (["mode=plan", "hardware=h100", "devices=auto"], "add devices=8"),
        (["mode=plan", "hardware=cpu", "trainer=gpu"], "add hardware="),
        (["mode=plan", "hardware=h100", "plan.csv=nowhere/plan.csv"], "the folder nowhere does not exist"),
        (["data=text"], "data.path is not set: add data.path="),
        (["data=tokens", "data.path=."], "data.tokenizer is not set: add data.tokenizer="),
        (["model=default", "model.num_layers=2", "model.num_heads=2"], "model.width is not set: add model.width="),
        (["seq_len=???"], "seq_len is not set"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_get_a_sentence(overrides, words) -> None:
    with pytest.raises(ValueError, match=r"\.") as error:
        check(composed(*overrides))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["strategy=lss_fsdp", "devices=4", "sequence_parallel_size=2"],
        ["strategy=megatron", "devices=4", "sequence_parallel_size=2"],
        ["strategy=ddp", "seq_len=4097"],
        ["strategy=single", "seq_len=4097"],
        ["devices=auto", "seq_len=4098"],  # how many there are is not known yet
        ["ckpt_path=."],
        ["ckpt_path=s3://bucket/last.ckpt"],
        ["mode=plan", "hardware=h100", "devices=64"],
    ],
    ids=" ".join,
)
def test_what_can_work_is_left_alone(overrides) -> None:
    check(composed(*overrides))


def test_the_world_has_the_devices_of_all_nodes() -> None:
    two_nodes = ["devices=2", "trainer.num_nodes=2"]
    check(composed(*two_nodes, "sequence_parallel_size=4"))  # more than a node has
    with pytest.raises(ValueError, match="does not divide the world size 4"):
        check(composed(*two_nodes, "sequence_parallel_size=3"))
    check(composed("devices=2", "seq_len=4100"))  # a multiple of twice 2, not of twice 4
    with pytest.raises(ValueError, match="cannot be split over 4 ranks"):
        check(composed(*two_nodes, "seq_len=4100"))
    check(composed(*two_nodes, "seq_len=4100", "strategy.layout=contiguous"))
