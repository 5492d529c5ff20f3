"""Several processes for one clip, over real gloo ranks: the numbers of one, and an end for all when one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import train_video
from sgm.config import load_run_config
from sgm.data.video_io import probe
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.run import layout_of
from sgm.inference.writer import read_latents
from sgm.parallel.sequence import shares_of
from sgm.parallel.team import Layout, ParallelError, choose_layout
from tests.sampling_tiny import REPO, configuration, main, start, write_release, write_yaml
from tests.training_tiny import configuration as training_configuration
from tests.training_tiny import run_ranks, write_clips
from tools.bench import models, scaling
from tools.bench import parallel as parallel_bench

SHARES = ("--set", "args.sequence_parallel_size=2")


@pytest.fixture(scope="module")
def found():
    return run_ranks(Path(__file__).with_name("parallel_worker.py"), ranks=8, groups=2)


def test_samples_gradients_and_frames_are_those_of_one_process(found):
    for rank, parts in enumerate(found):
        assert len(parts) == 10 + 3 * (rank < 3)
        for part, sizes in parts.items():
            for what, size in sizes.items():
                limit = {"samples": 1e-5, "gradients": 1e-12, "encoded": 1e-5}.get(what.split()[0], 0)
                assert size <= limit, (rank, part, what, size)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    found = configuration(write_release(folder), sampling_num_frames=5)
    found["model"]["network_config"]["params"]["num_frames"] = 17
    return write_yaml(folder / "c.yaml", found)


RANK_1_WITH_OTHER_VAE = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
import sample_video
*words, other = sys.argv[1:]
sys.exit(sample_video.main(words + ["--set", other] * (os.environ["RANK"] == "1"), listen=True))
"""


def test_two_processes_and_one_prompt_make_it_together(config, tmp_path):
    clip = write_clips(tmp_path / "clips", 1, 17) / "videos" / "0.mp4"  # which they encode together, too
    wish = [config, "--prompt", "a fox", "--video", clip, "--strength", 0.9, "--output-dir"]
    assert main(*wish, tmp_path / "alone", "--only-save-latents") == 0
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "1_a_hare").touch()  # in the place of a folder, so that only the first process meets an error
    both = [*wish, tmp_path / "both", "--prompt", "a hare", "--set", "args.cfg_parallel=true"]
    with start(*both, ranks=2) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and err.count("error: ") == err.count("1_a_hare") == 1, err
    assert "2 processes make a clip together: the two branches of guidance" in err and err.count("write:") == 1
    (video,) = (tmp_path / "both").rglob("*.mp4")
    assert probe(video).frames == 17
    decoder = torch.load(config.parent / "vae" / "3d-vae.pt", weights_only=True)
    decoder["state_dict"]["decoder.conv_out.conv.weight"].fill_(3e38)  # finite, the pixels are not
    torch.save(decoder, tmp_path / "vae.pt")
    (script := tmp_path / "rank_1.py").write_text(RANK_1_WITH_OTHER_VAE)
    other = f"model.first_stage_config.params.ckpt_path={tmp_path / 'vae.pt'}"
    with start(*wish, tmp_path / "saved", "--prompt", "a hare", *SHARES, other, ranks=2, script=script) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "2 shares of the tokens" in err, err
    assert err.count("error: ") == err.count("the pixels contain NaN") == 1 and "Traceback" not in err, err
    assert err.count("there is no video, but its latents") == 1, err
    (saved,), (alone,) = (list((tmp_path / name).rglob("*.safetensors")) for name in ("saved", "alone"))
    torch.save({}, tmp_path / "vae.pt")
    decode = [config, "--decode-latents", saved, *SHARES, other]
    with start(*decode, ranks=2, script=script) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and err.count("error: ") == err.count("vae.pt") == 1, err
    torch.testing.assert_close(read_latents(saved)[0], read_latents(alone)[0], rtol=0, atol=1e-5)


LEAVES_A_DECODE = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
import torch, sample_video
from sgm.models.autoencoder import VideoAutoencoder

rank, how, *words = sys.argv[1:]
decode_chunks = VideoAutoencoder.decode_chunks

def leave(*arguments):
    for chunk in decode_chunks(*arguments):
        if os.environ["RANK"] == rank:
            if how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk

VideoAutoencoder.decode_chunks = leave
sys.exit(sample_video.main(words, listen=True))
"""


@pytest.mark.parametrize(
    ("rank", "how", "code", "said"),
    [(1, "memory", 2, "the GPU of rank 1 ran out of memory"), (0, "kill", 137, "rank 0 was ended by SIGKILL")],
    ids=["memory", "kill"],
)
def test_a_process_that_leaves_a_shared_decode_loses_no_latents(config, tmp_path, rank, how, code, said):
    (script := tmp_path / "leaves.py").write_text(LEAVES_A_DECODE)
    wish = [rank, how, config, "--prompt", "x", *SHARES, "--output-dir", tmp_path / "out"]
    with start(*wish, ranks=2, script=script) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == code and err.count("error: ") == err.count(said) == 1 and "Traceback" not in err, err
    (saved,) = (p for p in (tmp_path / "out").rglob("*") if p.is_file() and ".partial-run" not in p.name)
    assert read_latents(saved)[1]["prompt"] == "x" and read_latents(saved)[0].shape[0] == 5


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc for the ranks' process ids")
def test_a_process_that_dies_ends_those_that_wait_for_it(config, tmp_path):
    with start(config, "--prompt", "x", "--steps", 900, "--output-dir", tmp_path, ranks=2) as job:
        while "encode:" not in (line := job.stderr.readline()):
            assert line, "it ended before the first step"
        os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1]), signal.SIGKILL)
        _, err = job.communicate(timeout=60)
    assert job.returncode == 137 and err.count("was ended by SIGKILL") == 1 and "Traceback" not in err, err
    assert not list(tmp_path.rglob("*.mp4"))


def test_processes_divide_as_asked_or_as_the_videos_need_them():
    assert choose_layout(2, 1, guided=True) == Layout(1, 2, 1)
    assert choose_layout(2, 1, guided=False) == Layout(1, 1, 2)
    assert choose_layout(2, 2, guided=True) == Layout(2)
    assert choose_layout(8, 1, guided=True) == Layout(1, 2, 4)
    assert choose_layout(8, 3, guided=True) == Layout(2, 2, 2)
    assert choose_layout(4, 1, guided=True, cfg_parallel=False) == Layout(1, 1, 4)
    assert choose_layout(4, 9, guided=True, cfg_parallel=True) == Layout(2, 2, 1)
    assert choose_layout(4, 9, guided=True, sequence=4) == Layout(1, 1, 4)
    assert choose_layout(1, 5, guided=True) == Layout()
    assert choose_layout(8, 1, guided=True, most_shares=3) == Layout(2, 2, 2)
    assert choose_layout(8, 1, guided=False, most_shares=4) == Layout(2, 1, 4)
    assert choose_layout(4, 1, guided=True, most_shares=1) == Layout(2, 2, 1)
    assert choose_layout(3, 1, guided=True, most_shares=1) == Layout(3)
    assert choose_layout(4, 1, guided=True, sequence=1) == Layout(2, 2, 1)
    assert choose_layout(4, 2, guided=True, sequence=1, together=2) == Layout(2, 2, 1)
    assert shares_of(30, 4) == [8, 8, 7, 7] and shares_of(17_776, 16) == [1111] * 16
    for wrong in ({"sequence": 3}, {"sequence": 4, "cfg_parallel": True}):
        with pytest.raises(ParallelError, match="start a multiple, as in NPROC="):
            choose_layout(4, 1, guided=True, **wrong)
    assert choose_layout(8, 9, guided=True, together=2) == Layout(4, 2, 1)
    with pytest.raises(ParallelError, match="here is one"):
        choose_layout(2, 1, guided=False, cfg_parallel=True)
    for allowed in (
        {"cfg_parallel": False, "sequence": 1},
        {"sequence": 1, "together": 4},
        {"sequence": 2, "together": 4},
    ):
        with pytest.raises(ParallelError, match="allow [12]: set it to 1"):
            choose_layout(4, 1, **{"guided": True, "together": 2, **allowed})


def test_more_processes_than_can_share_a_clip_do_not_end_a_run_that_asked_for_nothing(config):
    """The network has two heads; what mixins of one's own see cannot be shared."""
    asked = load_run_config([config], SampleArgs, flags={"prompts": ["a fox"]})
    pipeline = Pipeline(asked, torch.device("cpu"))
    assert layout_of(asked, pipeline, 8) == Layout(2, 2, 2)
    pipeline.engine.network.further_configs = {"own": {}}
    assert layout_of(asked, pipeline, 8) == Layout(4, 2, 1)


def test_what_cannot_be_shared_is_said(config, tmp_path, capsys):
    cp_size = ("--set", "model.first_stage_config.params.cp_size=2")
    alone = (*cp_size, "--set", "args.sequence_parallel_size=1", "--set", "args.cfg_parallel=false")
    of_stage = "cp_size in first_stage_config.params asks"
    for wish, said in ((SHARES, "ask for 2 processes a clip"), (cp_size, of_stage), (alone, of_stage)):
        assert main(config, "--prompt", "x", *wish) == 2
        assert said in (err := capsys.readouterr().err) and ("this run has 1" in err or "allow 1" in err)
    training = write_yaml(
        tmp_path / "t.yaml", training_configuration(config.parent, write_clips(tmp_path / "clips", 1), None)
    )
    assert train_video.main([str(training), "--dry-run", *cp_size]) == 2
    assert "cp_size asks for 2 processes a clip, which in training" in capsys.readouterr().err


def test_what_is_predicted_for_more_processes_agrees_with_what_two_have_shown():
    found = {(line["part"], line["processes"], line["guidance"]): line for line in scaling.rows() if line["clips"] == 1}
    names = ("ms", "sent_mib", "waiting", "peak_gib")
    for part, shown in (("guided call", (246, 3971, 0.04, 10.9)), ("decode", (364, 8038, 0.038, 18.0))):
        assert [found[part, 2, 1][name] for name in names] == pytest.approx(shown, rel=0.02)
    assert found["guided call", 4, 2]["ms"] == pytest.approx(434 / 4 + 14.5, rel=0.01)
    assert scaling.Shapes.of(scaling.CONFIG).share(4) > 0.25  # of 30 heads one has eight


def test_the_benchmark_s_network_has_positions_for_clips_longer_than_trained_ones():
    network = models.our_network("configs/demo_infer.yaml", "fp32", torch.device("cpu"), frames=21)
    with torch.no_grad():
        clip = models.Clip(21, 4, 6)
        assert network(*models.network_inputs(network, clip, torch.device("cpu"))).shape == (2, 21, 16, 4, 6)


def test_the_benchmark_is_for_several_processes(capsys):
    with pytest.raises(SystemExit):
        parallel_bench.parse([])
    assert "start several by `python -m sgm.launch`" in capsys.readouterr().err
