"""What the command line says to those who mistype it, or type nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from twinflow_rt import __version__, cli
from twinflow_rt.cli import sensitivity, train


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "usage", "message"),
    [
        (("genrate", "a"), "usage: twinflow-rt command", "did you mean generate?"),
        (("generate", "a", "--sede", "5"), "usage: twinflow-rt generate", "no option --sede: did you mean --seed?"),
        (("serve", "--prot=80"), "usage: twinflow-rt serve", "no option --prot: did you mean --port?"),
        (("train", "demo", "--recipie", "flow"), "usage: twinflow-rt train demo", "did you mean --recipe?"),
        (("train", "dmo"), "usage: twinflow-rt train", "did you mean demo?"),
        (("generate", "a", "--capture", "graph"), "usage: twinflow-rt generate", "did you mean graphs?"),
        (("inspect", "demo", "twice"), "usage: twinflow-rt inspect", "nothing takes 'twice'"),
        (("batch", "demo", "p.txt"), "usage: twinflow-rt batch -o FOLDER", "required: -o/--output"),
        (("eval", "--nfe", "x"), "usage: twinflow-rt eval", "--nfe: invalid int value: 'x'"),
    ],
)
def test_mistakes_are_met_with_the_right_usage_and_a_suggestion(capsys, argv, usage, message):
    said = refused(capsys, *argv)
    assert said.startswith(usage) and message in said and len(said.splitlines()) <= 3


def test_what_is_like_nothing_gets_no_suggestion(capsys):
    assert "did you mean" not in refused(capsys, "generate", "a", "--xyzzy")


def test_nothing_is_a_question_for_help(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)


def test_version_names_what_a_report_needs(capsys):
    import torch

    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and said.count("\n") == 1
    assert f"twinflow-rt {__version__}, " in said and f"torch {torch.__version__}, " in said


def test_help_of_every_command_is_quick():
    code = (
        "import sys, time; began = time.process_time(); import twinflow_rt.cli as c\n"
        "for name in c.COMMANDS:\n"
        "    args = c.build_parser([name]).parse_args([name, *GIVEN.get(name, ['x'])])\n"
        "    assert len(args.parser.format_help()) > 300\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(time.process_time() - began)"
    )
    given = {"generate": ["x"], "kernels": [], "serve": [], "eval": [], "train": ["demo"]}
    given |= {"convert": ["x", "y", "--base", "z"], "batch": ["x", "y", "-o", "z"], "export": ["x", "-o", "z"]}
    run = subprocess.run([sys.executable, "-c", f"GIVEN = {given}\n{code}"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < len(cli.COMMANDS)  # seconds: less than one each, all together take half of one


def test_choices_that_are_repeated_for_quick_help_are_the_true_ones():
    from twinflow_rt.planning.precision import MEASURED
    from twinflow_rt.planning.sensitivity import BUDGETS
    from twinflow_rt.training.demo import RECIPES

    assert sensitivity.MEASURED == MEASURED and BUDGETS == {"int8": 0.03, "fp8": 0.06, "int4": 0.1, "bf16": 0.03}
    assert tuple(sorted(RECIPES)) == train.RECIPES


def test_completion_of_commands_options_and_choices(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--print-completion", "bash"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and all(word in said for word in (*cli.COMMANDS, "--num-images", "graphs"))


@pytest.mark.parametrize(
    ("argv", "module", "extra"),
    [
        (["eval"], "scipy", "eval"),
        (["eval", "--data"], "diffusers", "train"),
        (["train", "demo"], "transformers", "train"),
        (["serve"], "uvicorn", "serve"),
        (["serve", "--ray"], "ray", "ray"),
        (["bench", "demo", "--html", "page.html"], "matplotlib", "report"),
        (["bench", "demo", "--peers", "diffusers"], "diffusers", "train"),
        (["--print-completion", "zsh"], "shtab", "completion"),
    ],
)
def test_absent_packages_are_named_before_any_work(capsys, monkeypatch, tmp_path, argv, module, extra):
    def worked(*_, **__):
        raise AssertionError("began before it looked for its packages")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    for work in ("loading.load", "training.demo.train", "bench.runner.load", "bench.runner.run_probe"):
        monkeypatch.setattr(f"twinflow_rt.{work}", worked)
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert f"needs {module}" in said and f"pip install '.[{extra}]' in a checkout" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
