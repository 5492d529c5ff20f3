"""Configuration files and `target:` names: precedence, types, typos, and that a YAML file runs no code."""

from __future__ import annotations

import copy
import inspect
import json
import re
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import pytest

from sgm import secrets, util
from sgm.cli import exit_code, report
from sgm.config import ConfigError, check_model_section, load_run_config, merge_yaml, option
from sgm.inference.options import SampleArgs
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.options import TrainArgs
from sgm.typed import Misfit, coerce
from sgm.util import Role, TargetError, get_obj_from_str, instantiate_from_config

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Args:
    count: int = option(1, "a number", at_least=1)
    rate: float = option(0.5, "another")
    name: str | None = option(None, "a name", choices=("x", "y"))
    active: bool = option(False, "a switch")
    many: list[str] = option([], "names")


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("value", ["false", "true"])
def test_training_has_no_use_for_image2video(tmp_path, value):
    file = write(tmp_path, "a.yaml", f"args: {{image2video: {value}, load: w, train_data: [d]}}\nmodel: {{k: 1}}")
    assert "args.image2video has no effect here" in load_run_config([file], TrainArgs).notes


@pytest.mark.parametrize(
    ("reads", "taken", "words"),
    [
        (True, 16, "noised_image_input is true, but in_channels 16 with out_channels 16 is of text-to-video networks"),
        (
            False,
            32,
            "noised_image_input is false, but in_channels 32 with out_channels 16 is of image-to-video networks",
        ),
        (None, 20, "in_channels is 20; with out_channels 16 a text-to-video network takes 16 and .* 32"),
    ],
)
def test_image_keys_and_channels_fit_each_other(reads, taken, words):
    network = {"params": {"in_channels": taken, "out_channels": 16}}
    model = {"network_config": network, "denoiser_config": {}} | (
        {} if reads is None else {"noised_image_input": reads}
    )
    with pytest.raises(ConfigError, match=words):
        check_model_section(model, SATVideoDiffusionEngine)


def test_later_keys_without_effect_are_named_once(tmp_path):
    keys = "augmentation_dropout: 0.15, lora_train: false, lr_scale: 2, use_pd: true"
    file = write(tmp_path, "a.yaml", f"args: {{}}\nmodel: {{{keys}}}")
    rotary = {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": {"height_interpolation": 1.875}}
    place = "model.network_config.params.modules.pos_embed_config"
    notes = load_run_config([file], SampleArgs, overrides=[f"{place}={json.dumps(rotary)}"]).notes
    named = [note.split()[0] for note in notes]
    assert named[:3] == ["model.augmentation_dropout", "model.use_pd", "model.lr_scale"]
    assert named[3:] == [f"{place}.params.height_interpolation"]


def test_precedence(tmp_path):
    files = [write(tmp_path, "a.yaml", "args: {count: 2, rate: 1e-8, name: x}\nmodel: {k: {a: 1, b: 2}}"),
             write(tmp_path, "b.yaml", "args: {count: 3}\nmodel: {k: {b: 5}}")]  # fmt: skip
    config = load_run_config(
        files, Args, overrides=["args.count=4", "args.many=[p, q]"], flags={"count": 5, "name": None}
    )
    assert config.args == Args(5, 1e-8, "x", False, ["p", "q"]) and config.model == {"k": {"a": 1, "b": 5}}
    assert load_run_config(files, Args, overrides=["args.count=4"]).args.count == 4
    assert load_run_config(files, Args).args.count == 3
    assert config.hash(("args",)) != load_run_config(files, Args).hash(("args",))
    assert config.hash() == load_run_config(files, Args).hash()


def test_all_problems_at_once(tmp_path):
    file = write(tmp_path, "a.yaml", "args: {cuont: 2, active: 'False', name: z, count: 0}\nmodle: {}\n")
    with pytest.raises(ConfigError) as error:
        load_run_config([file], Args)
    text = str(error.value)
    assert text.startswith(f"6 problems in {file}:")
    for words in ("args.cuont; did you mean `count`", "args.active: expected true or false, got 'False'", "no `model:`",
                  "'z' is not one of 'x', 'y'", "must be at least 1, got 0", "`modle`; did you mean `model`"):  # fmt: skip
        assert words in text
    for given in ({"flags": {"count": 0}}, {"overrides": ["args.count=0"]}):
        with pytest.raises(ConfigError, match=r"a\.yaml, the options given:\n"):
            load_run_config([file], Args, **given)


def test_names_of_the_original_without_use_here_are_named_once(tmp_path):
    file = write(tmp_path, "a.yaml", "args: {count: 2, block_size: 7}\nmodel: {a: 1}\ndeepspeed: {x: 1}\n")
    config = load_run_config([file], Args)
    assert config.notes == ("args.block_size has no effect here",) and config.deepspeed == {"x": 1}


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [("1e-8", float, 1e-8), (3, float, 3.0), ("7", int, 7), (2.0, int, 2), (5, str, "5"), ("x", list[str], ["x"]),
     ([1, 2], list[int], [1, 2]), (None, int | None, None), (True, bool, True), (2**53 + 1, int, 2**53 + 1)],
)  # fmt: skip
def test_values_become_their_type(value, kind, expected):
    assert coerce(value, kind) == expected and type(coerce(value, kind)) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("x", int), (1.5, int), (True, int), ("1", bool), (0, bool), (None, str), ({}, str), ({}, list[int]), ("inf", int),
     (["a"], list[int]), (10**400, int), (10**400, float), (2**63, int), (float("inf"), float), (b"x", str), ("a\0", str),
     ("\ud800", str)],
)  # fmt: skip
def test_values_of_another_type_are_refused(value, kind):
    with pytest.raises(ValueError, match="expected|got"):
        coerce(value, kind)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file at .*absent\.yaml; there are: .*a\.yaml"):
        write(tmp_path, "a.yaml", "args: [")
        merge_yaml([tmp_path / "absent.yaml"])
    with pytest.raises(ConfigError, match="not valid YAML"):
        merge_yaml([tmp_path / "a.yaml"])
    with pytest.raises(ConfigError, match="must hold a mapping"):
        merge_yaml([write(tmp_path, "b.yaml", "- 1\n- 2\n")])
    with pytest.raises(ConfigError, match="not valid YAML"):
        (tmp_path / "c.yaml").write_bytes(b"args: \xff\xfe")
        merge_yaml([tmp_path / "c.yaml"])
    with pytest.raises(ConfigError, match="nowhere"):
        merge_yaml([write(tmp_path, "d.yaml", "a: ${nowhere.to.be.found}")])


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\na: 2", "found duplicate key a in .*a.yaml., line 2"), ("\ta: 1", "line 1, column 1"), ("a: &x [*x]", "recursive"),
     ("--- 1", "not valid YAML"), ("a: !!bool x", "not valid YAML"), ("a: " + "9" * 5000, "4300 digits"), ("null: 1", "key type"),
     ("\n".join(" " * k + "a:" for k in range(400)), "recursion"), ("a: {1: 2}", "a.1 is no text"), ("a: '???'", "a: Missing"),
     ("a: ${a}", "a: Recursive"), ("a: ${b.c}\nb: {c: '${a}'}", "Recursive"), ("a: ${", "a: no viable"), ("a: ${nope:1}", "a: Unsup"),
     ("a: ${oc.dict.keys:a}", "a: Recursion")],
)  # fmt: skip
def test_text_that_gives_no_mapping_is_one_error_with_its_place(tmp_path, text, said):
    with pytest.raises(ConfigError, match=rf"a\.yaml(.|\n)*{said}"):
        merge_yaml([write(tmp_path, "a.yaml", text)])


def test_what_comes_from_the_environment_is_used_and_not_shown(tmp_path, monkeypatch, capsys):
    file = write(tmp_path, "a.yaml", "args: {name: '${oc.env:NAME_OF_IT}', many: ['${args.name}-b', 'c \\${d}'], count: 2}\n"
                 "model: {a: '${oc.decode:${oc.env:NUMBER}}'}")  # fmt: skip
    kind = make_dataclass("Free", [("name", str), ("many", list[str]), ("count", int)])

    def load(text="pass'word", **flags):
        monkeypatch.setenv("NAME_OF_IT", text)
        monkeypatch.setenv("NUMBER", "771177")
        return load_run_config([file], kind, flags=flags)

    config = load()
    assert (
        config.args.name == "pass'word"
        and config.args.many == ["pass'word-b", "c ${d}"]
        and config.model["a"] == 771177
    )
    assert "word" not in config.as_yaml() and "771177" not in config.as_yaml()
    again = load_run_config([write(tmp_path, "b.yaml", config.as_yaml())], kind)
    assert again.args == config.args and again.hash(("args", "model")) == config.hash(("args", "model"))
    assert load("other words").hash(("args",)) != config.hash(("args",))  # another run
    assert load(name="given").as_dict()["args"]["name"] == "given"
    with pytest.raises(ConfigError) as error:
        load_run_config([file], kind, overrides=["args.count=${oc.env:NAME_OF_IT}"])
    assert exit_code(lambda: report(error.value)) == 0 and 'got "${oc.env:NAME_OF_IT}"' in capsys.readouterr().err
    assert secrets.hidden_in({"a": ["x pass'word", 'y"']}) == {"a": ["x ${oc.env:NAME_OF_IT}", 'y"']}


@pytest.mark.parametrize("text", ["args.count", "=3", "args.count=[", "args.many.x.y=1"])
def test_bad_overrides_are_quoted(tmp_path, text):
    with pytest.raises(ConfigError, match="--set"):
        merge_yaml([write(tmp_path, "a.yaml", "args: {many: [a]}")], [text])


@pytest.mark.parametrize(
    ("value", "read"),
    [("{your_path}", "{your_path}"), ("{your_path}/vae/3d-vae.pt", "{your_path}/vae/3d-vae.pt"), ("{a: 1}", {"a": 1}),
     ("{}", {}), ("{a, b}", {"a": None, "b": None}), ("[{a: 1}]", [{"a": 1}]), ("{}x", None)],
)  # fmt: skip
def test_a_braced_word_is_a_placeholder(tmp_path, value, read):
    file = write(tmp_path, "a.yaml", "args: {load: x}")
    if read is None:
        with pytest.raises(ConfigError, match="--set"):
            merge_yaml([file], [f"args.load={value}"])
    else:
        assert merge_yaml([file], [f"args.load={value}"])["args"]["load"] == read


def test_stray_quote_of_the_guide(tmp_path):
    file = write(tmp_path, "a.yaml", 'model: {log_keys: ["txt\'"]}')
    config = load_run_config([file], Args)
    assert config.model["log_keys"] == ["txt"] and "stray quote" in config.notes[0]


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("dit_video_concat.DiffusionTransformer", "sgm.models.network"),
        ("sgm.modules.GeneralConditioner", "sgm.modules.conditioner"),
        ("vae_modules.autoencoder.VideoAutoencoderInferenceWrapper", "sgm.models.autoencoder"),
        ("sgm.models.autoencoder.VideoAutoencoderInferenceWrapper", "sgm.models.autoencoder"),
        ("diffusion_video.SATVideoDiffusionEngine", "sgm.models.diffusion"),
        ("data_video.SFTDataset", "sgm.data.dataset"),
        ("torch.nn.Identity", "torch.nn.modules.linear"),
    ],
)
def test_names_of_the_original_resolve(name, found):
    assert get_obj_from_str(name).__module__ == found


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "subprocess.Popen", "sat.helpers.os.system", "sgm.util.importlib.import_module",
     "deepspeed.ops.op_builder.builder.subprocess.check_output", "torch.nn.functional.relu", "torch.hub.load",
     "sgm.config.json.loads", "sgm.modules.encoders.t5_files.Path", "sgm.util.allow_target", "", "sgm", "sgm.config"],
)  # fmt: skip
def test_what_is_no_class_of_ours_is_refused(name):
    with pytest.raises(TargetError, match=r"not allowed|unknown target"):
        get_obj_from_str(name)


def test_typo_in_a_target_is_met_with_the_nearest():
    with pytest.raises(TargetError, match=r"did you mean `sgm\.modules\.diffusionmodules\.guiders\.DynamicCFG`"):
        get_obj_from_str("sgm.modules.diffusionmodules.guiders.DynamicCfg")


def test_own_packages_can_be_allowed(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text("class Net:\n    def __init__(self, size=1): self.size = size\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(util, "ALLOWED_PREFIXES", list(util.ALLOWED_PREFIXES))
    with pytest.raises(TargetError, match="--allow-target my_nets"):
        get_obj_from_str("my_nets.Net")
    util.allow_target("my_nets")
    assert instantiate_from_config({"target": "my_nets.Net", "params": {"size": 3}}).size == 3


def test_params_are_checked():
    scale = "sgm.modules.diffusionmodules.guiders.VanillaCFG"
    assert instantiate_from_config({"target": scale, "params": {"scale": 2}}).scale == 2
    assert instantiate_from_config({"target": scale}, scale=4).scale == 4
    with pytest.raises(TargetError, match="VanillaCFG.scal; did you mean `scale`"):
        instantiate_from_config({"target": scale, "params": {"scal": 2}})
    with pytest.raises(TargetError, match="scale stands beside `target:`"):
        instantiate_from_config({"target": scale, "scale": 2})
    for config in ({}, "x", {"params": {}}, None):
        with pytest.raises(TargetError, match="expected a mapping with `target:`"):
            instantiate_from_config(config)


NETWORK, SAMPLER = "dit_video_concat.DiffusionTransformer", "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"
GUIDER, T5 = "sgm.modules.diffusionmodules.guiders.DynamicCFG", "sgm.modules.encoders.modules.FrozenT5Embedder"


ANY = Role(object, ("sgm.", "torch."))


@pytest.mark.parametrize(
    ("target", "params", "problem"),
    [
        (NETWORK, {"num_layers": "six"}, "num_layers: expected a whole number, got 'six'"),
        (NETWORK, {"num_layers": 6.5}, "num_layers: expected a whole number, got 6.5"),
        (NETWORK, {"num_layers": None}, "num_layers: expected a whole number, got None"),
        (NETWORK, {"num_layers": [6]}, r"num_layers: expected a whole number, got \[6\]"),
        (NETWORK, {"patch_size": "x"}, "patch_size: expected a whole number, got 'x'"),
        (NETWORK, {"elementwise_affine": "False"}, "elementwise_affine: expected true or false, got 'False'"),
        (SAMPLER, {"num_steps": "x"}, "num_steps: expected a whole number, got 'x'"),
        (GUIDER, {"scale": True}, "scale: expected a number, got True"),
        (GUIDER, {"scale": "nan"}, "scale: expected a finite number, got 'nan'"),
        (T5, {"model_dir": {"your_path": None}}, "model_dir: expected text, got {'your_path': None}"),
    ],
)
def test_values_of_a_wrong_type_are_refused(target, params, problem):
    with pytest.raises(TargetError, match=problem.partition(": ")[2]):
        util.check_params(target, get_obj_from_str(target), params)
    with pytest.raises(Misfit) as error:
        ANY.fit({"target": target, "params": params}, "model.part")
    assert [p for p in error.value.problems if re.fullmatch(rf"model\.part\.params\.{problem}", p)]
    with pytest.raises(Misfit, match="model.part: .*`params:` must be a mapping, it is 5"):
        ANY.fit({"target": target, "params": 5}, "model.part")


@pytest.mark.parametrize(
    ("target", "params", "built_with"),
    [
        (NETWORK, {"num_layers": 6, "patch_size": [1, 2, 2], "time_embed_dim": None}, {}),
        (NETWORK, {"num_layers": 6.0, "height_interpolation": "1e-5"}, {"num_layers": 6, "height_interpolation": 1e-5}),
        (GUIDER, {"scale": 6, "exp": "5"}, {"exp": 5}),
        (SAMPLER, {"num_steps": None, "verbose": 1, "device": "cpu"}, {"verbose": True}),
        ("torch.nn.Identity", {"anything": "x"}, {}),
        ("torch.nn.Linear", {"in_features": 3, "device": "meta"}, {}),
    ],
)
def test_values_that_read_as_the_type_are_accepted(target, params, built_with):
    cls = get_obj_from_str(target)
    found = util.check_params(target, cls, params, given=inspect.signature(cls).parameters)
    assert found == params | built_with and {k: type(v) for k, v in found.items()} == {
        k: type(v) for k, v in (params | built_with).items()
    }


def test_what_stands_beside_targets_and_in_the_engine_is_typed():
    model = merge_yaml([REPO / "configs" / "demo_infer.yaml"])["model"]
    check_model_section(model, SATVideoDiffusionEngine)
    model["scale_factor"] = "1e-1"
    check_model_section(model, SATVideoDiffusionEngine)
    model["scale_factor"] = "abc"
    model["conditioner_config"]["params"]["emb_models"][0] |= {"ucg_rate": "x", "is_trainable": "no"}
    with pytest.raises(ConfigError) as error:
        check_model_section(model, SATVideoDiffusionEngine)
    for words in ("model.scale_factor: expected a number, got 'abc'", "emb_models[0].ucg_rate: expected a number, got 'x'",
                  "emb_models[0].is_trainable: expected true or false, got 'no'", "3 problems"):  # fmt: skip
        assert words in str(error.value)


DATASET, RUN_LOG, STORE = (
    "sgm.data.dataset.SFTDataset",
    "sgm.training.watch.run_log.RunLog",
    "sgm.cache.store.CacheStore",
)


@pytest.mark.parametrize("target", [DATASET, RUN_LOG, STORE, "torch.optim.SGD", "sgm.config.RunConfig"])
def test_each_slot_takes_classes_of_its_own_role(target):
    """Of every slot of a configuration, however deep: none takes what may read or write files, nor another slot's."""
    model = merge_yaml([REPO / "configs" / "demo_lora.yaml"])["model"]
    places = list(slots(model))
    assert len(places) > 20
    for place in places:
        hostile = copy.deepcopy(model)
        node = hostile
        for key in place:
            node = node[key]
        node["target"] = target
        with pytest.raises(ConfigError, match=f"{place[-1]}.*{target}.* has another role; choose ") as error:
            check_model_section(hostile, SATVideoDiffusionEngine)
        assert str(error.value).startswith("1 problem in the model section")


def slots(node, place=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        if isinstance(inner, dict) and "target" in inner and not isinstance(key, int):
            yield (*place, key)
        yield from slots(inner, (*place, key))


def test_building_an_engine_touches_no_file(tmp_path):
    (tmp_path / "report").write_text("precious")
    model = merge_yaml([REPO / "configs" / "demo_infer.yaml"])["model"]
    params = {"data_dir": str(tmp_path), "report": str(tmp_path / "report")}
    for slot in ("first_stage_config", "denoiser_config", "network_config"):
        with pytest.raises(TargetError, match=f"model.{slot}.*another role"):
            SATVideoDiffusionEngine(**model | {slot: {"target": DATASET, "params": params}})
    assert (tmp_path / "report").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "problem"),
    [("network_config.params.num_layers=-1", "num_layers: must be at least 1 and at most 1024, got -1"),
     ("network_config.params.hidden_size=1e308", "hidden_size: expected a whole number below 2^63, got 1e+308"),
     ("network_config.params.latent_width=.inf", "latent_width: expected a finite whole number, got inf"),
     ("network_config.params.modules=[]", "model.network_config.params.modules: expected a mapping, got []"),
     ("network_config.params.modules.pos_embed_config=null", "pos_embed_config: expected a mapping, got None"),
     ("network_config.params.transformer_args.vocab_size=0", "transformer_args.vocab_size: must be at least 1"),
     ("first_stage_config.params.cp_size=x", "model.first_stage_config.params.cp_size: expected a whole number, got 'x'"),
     ("first_stage_config.params.encoder_config.params.ch_mult=[1, 0]", "ch_mult[1]: must be at least 1 and at most 1024, got 0"),
     ("conditioner_config.params.emb_models=[5]", "model.conditioner_config.params.emb_models[0]: expected a mapping, got 5"),
     ("sampler_config.params.guider_config.params.exp=5000", "guider_config.params.exp: must be at least 0 and at most 64"),
     (f"first_stage_config.params.ckpt_path={'a' * 300}", "ckpt_path: too long for the name of a file: 'aaa"),
     ("first_stage_config.params.ckpt_path=~nobody-here/x", "ckpt_path: there is no such user: '~nobody-here/x'"),
     ("scale_factor=0", "model.scale_factor: must be above 0"),
     ("denoiser_config.target=sat.model.nope.X", "model.denoiser_config: unknown target 'sat.model.nope.X'")],
)  # fmt: skip
def test_every_value_has_a_type_and_a_range(change, problem):
    model = merge_yaml([REPO / "configs" / "demo_infer.yaml"], [f"model.{change}"])["model"]
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_model_section(model, SATVideoDiffusionEngine)


@pytest.mark.parametrize("name", [p.name for p in sorted((REPO / "configs").glob("*.yaml"))])
def test_every_shipped_model_section_has_the_right_types(name):
    files = [REPO / "configs" / "cogvideox_2b_sft.yaml", REPO / "configs" / name]
    check_model_section(merge_yaml(files)["model"], SATVideoDiffusionEngine)


# --- shipped files -------------------------------------------------------------------------------------------------


def test_shipped_inference_file_has_the_originals_keys_and_values():
    """Facts of the original's file; placeholders in the guide's form."""
    config = load_run_config([REPO / "configs" / "cogvideox_2b_infer.yaml"], SampleArgs)
    args, model = config.args, config.model
    assert (args.batch_size, args.input_type, args.input_file, args.sampling_num_frames) == (1, "txt", "test.txt", 13)
    assert args.fp16 and args.force_inference and args.sampling_fps == 8 and args.latent_channels == 16
    assert args.load == "{your_CogVideoX-2b-sat_path}/transformer"
    assert model["first_stage_config"]["params"]["ckpt_path"] == "{your_CogVideoX-2b-sat_path}/vae/3d-vae.pt"
    (embedder,) = model["conditioner_config"]["params"]["emb_models"]
    assert embedder["params"] == {"model_dir": "google/t5-v1_1-xxl", "max_length": 226} and embedder["ucg_rate"] == 0.1
    assert model["scale_factor"] == 1.15258426 and model["log_keys"] == ["txt"]
    network = model["network_config"]["params"]
    assert (network["hidden_size"], network["num_layers"], network["adm_in_channels"]) == (1920, 30, 256)
    assert model["sampler_config"]["params"]["guider_config"]["params"] == {"scale": 6, "exp": 5, "num_steps": 50}
    assert not config.notes
