"""`refreekv bench` on a tiny model: what it prints and writes, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refreekv_cpp.cli import app
from refreekv_cpp.lab.bench.runner import Contestant, Result
from refreekv_cpp.lab.commands.bench import contestants_of

FULL = Contestant("full", False, "full")


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_model), "--kv-policy", "full,streaming", "--tokens", "700"]
    files = ["--json", str(tmp_path / "run.json"), "--plot", str(tmp_path / "run.png")]
    result = CliRunner().invoke(app, [*arguments, *files, "--rounds", "2", "--repeats", "2", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    assert "full reads faster with flash attention" in " ".join(result.stderr.split())
    assert (tmp_path / "run.png").stat().st_size > 0

    rows = json.loads((tmp_path / "run.json").read_text())
    assert [(row["name"], row["flash_attn"]) for row in rows] == [
        *[("full", False), ("streaming", False), ("full", True), ("streaming", True)]
    ]
    for row in rows:
        assert (len(row["load_s"]), len(row["read_s"]), len(row["prune_s"])) == (2, 4, 2)  # 512 tokens and 188, twice
        assert (len(row["decode_s"]), row["n_decoded"]) == (2 * 2 * 7, 2 * 2 * 8)
        assert 0 < row["n_reused"] <= row["n_decoded"]
        assert row["rss_peak"] >= row["rss"] > 0
        assert (row["kv"]["budget"] < 1) == (row["name"] == "streaming")


def test_ratios_by_hand() -> None:
    base = Result(FULL, 1000, load_s=[1.0, 1.0], read_s=[1.0, 2.0, 4.0, 1.0], decode_s=[0.01, 0.02, 0.03])
    other = Result(FULL, 1000, load_s=[1.0, 1.0], read_s=[1.0, 2.2, 8.0, 1.1], decode_s=[0.02])
    assert base.tokens_per_second == 250
    assert other.read_ratio(base) == pytest.approx(1.1)
    assert base.decode_ms == pytest.approx(20)
    assert base.decode_quartiles_ms == pytest.approx((10, 30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-policy", "refrekv"], "did you mean 'refreekv'"),
        *((["--tokens", text], "must be different positive numbers") for text in ("0", "abc", "64,64", "")),
        (["--kv-policy", "full@q9"], "the type must be one of"),
        (["--kv-policy", "full@q8_0", "--no-flash-attn"], "quantised values need --flash-attn"),
        (["--against", "nowhere"], "there is no libllama in it"),
    ],
)
def test_what_cannot_run_is_refused(tiny_model: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(tiny_model), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_memory_of_whole_processes(tiny_model: Path) -> None:
    arguments = ["memory", str(tiny_model), "--kv-policy", "full,streaming,streaming@f32"]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "600", "--n-ctx", "1024", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["full", "streaming", "streaming@f32"]
    for row in rows:
        loaded, peak, settled = (float(cell.removesuffix(" MiB")) for cell in row[1:4])
        assert 0 < loaded <= peak
        assert 0 < settled <= peak
    assert rows[0][4:6] == ["× 1.000", "× 1.000"]


def test_stock_has_each_of_the_types(tmp_path: Path) -> None:
    (tmp_path / "libllama.so").touch()
    contestants = contestants_of("refreekv,refreekv@q8_0", tmp_path, flash_attn=True)
    assert [(c.name, c.kv_policy, c.cache_type) for c in contestants] == [
        ("stock", None, "f16"),
        ("stock@q8_0", None, "q8_0"),
        ("refreekv", "refreekv", "f16"),
        ("refreekv@q8_0", "refreekv", "q8_0"),
    ]
