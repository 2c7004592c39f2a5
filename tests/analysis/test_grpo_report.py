"""The report of GRPO runs: complete, harmless whatever a model writes, and whole when files are not."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxmem.analysis import grpo_curves, grpo_report, grpo_seeds
from jaxmem.training import run

EVIL = "</td></table><script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b[31m\x00\ud800"
SHOWN = "<script>alert('x')</script><img src=x onerror=alert(1)>{{ 7 * 7 }}�[31m�?"
GAP = "sampling/sampling_logp_difference"
VOID = {"meta", "img", "image", "line", "polyline", "circle", "path", "rect", "br", "link"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag must be closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def step(number, reward, **more):
    line = {"step": number, "reward": reward, "reward_std": 0.4, "frac_reward_zero_std": 0.25, "kl": 0.0}
    line |= {"completions/mean_length": 19.0, "completions/clipped_ratio": 0.1, "entropy": 0.2, "loss": 0.0}
    line |= {f"{GAP}/mean": 1e-7, f"{GAP}/p99": 2e-6, "grad_norm": 1.0, "step_time": 2.0, "gate/pvm/layer_8": 0.1}
    return line | {"time/rollout": 0.5, "time/reward": 0.1, "time/update": 0.4, "rewards/board/mean": reward} | more


def sample(number, image, text):
    one = {"text": text, "tokens": 3, "truncated": False, "reward": 1.0, "advantage": 0.5, "rewards": {"board": 1.0}}
    failed = one | {"text": "", "truncated": True, "reward": None, "advantage": 0.0, "rewards": {"board": None}}
    return {"step": number, "image": image, "name": "row 0", "prompt": EVIL, "completions": [one, failed]}


def write(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(folder, gain=0.1, steps=8):
    evaluated = [{"step": at, "eval/reward": 0.4 + gain * (at > 0)} for at in (0, steps)]
    write(folder, "metrics.jsonl", [evaluated[0], *(step(i + 1, 0.2 + gain * i) for i in range(steps)), evaluated[1]])
    (folder / "samples").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "samples" / "1_0.png")
    names = ("samples/1_0.png", "samples/1_0.png", "samples/gone.png")
    write(folder, "samples.jsonl", [sample(i, n, f"{EVIL} at {i}") for i, n in zip((1, 3, 5), names, strict=True)])
    failed = [{"step": i, "event": "reward_failed", "detail": EVIL} for i in (2, 4)]
    write(folder, "events.jsonl", [*failed, {"step": 5, "event": "empty_completions", "count": 3}])
    grpo = {"group": 8, "max_new_tokens": 28, "temperature": 1.0, "loss": {"kind": "dapo", "kl_weight": 0.0}}
    grpo |= {"rewards": {"functions": [{"name": "board"}, "math"]}}
    config = {"output": str(folder), "trainable": ["memory"], "grpo": grpo, "loop": {"batch_size": 8}, "seed": 3}
    (folder / "run.json").write_text(json.dumps({"config": config, "versions": {"python": "3.11"}}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "run")


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_model_text_is_shown_and_never_run(folder):
    text, page = read(grpo_report.write(folder))
    assert "script" not in page.tags and "49" not in [part.strip() for part in page.texts]
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.text.count(SHOWN) == 5  # two prompts, two completions, the last event of its kind
    assert "default-src 'none'" in text and "\x00" not in text and "\x1b" not in text


def test_a_page_needs_nothing_but_itself(folder):
    _, page = read(grpo_report.write(folder))
    links = [value for _, name, value in page.attributes if name in ("src", "href", "data", "action")]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    assert page.tags.count("html") == 1 and "link" not in page.tags


def test_what_a_page_shows(folder):
    _, page = read(grpo_report.write(folder))
    charts = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert charts == [
        *("Reward", "Signal", "Mean length", "Cut off by the limit", "Entropy", "Sampler against trainer"),
        *("Gradient norm", "Gates", "Shares of a step's time", "Step"),
    ]
    assert "Held-out reward went from 0.400 to 0.500." in page.text
    assert "Reward in training went from 0.250 to 0.850 in 8 steps" in page.text
    for part in ("32 completions/s", "board, math", "image not found", "(cut off)", "(nothing)", "+0.5", "grpo.group"):
        assert part in page.text
    assert " at 1" in page.text and " at 5" in page.text and " at 3" not in page.text  # the first and the last
    rows = [row[:3] for row in grpo_report.events(folder)]
    assert rows == [("reward_failed", "2", "2, 4"), ("empty_completions", "1", "5, 5")]


def test_divergence_is_drawn_where_there_is_one(folder):
    history = [step(1, 0.0, kl=0.0), step(2, 0.0, kl=0.3)]
    assert any("Divergence" in chart for section in grpo_curves.all_charts(history) for chart in section.charts)


@pytest.mark.parametrize("line", [step(1, None, **{f"{GAP}/mean": None, "entropy": math.nan}), {"step": 1}])
def test_values_that_are_no_numbers_are_left_out(folder, line):
    write(folder, "metrics.jsonl", [line, {"other": 1}, step(2, None, entropy=math.inf)])
    _, page = read(grpo_report.write(folder))
    assert "The run wrote down no reward." in page.text and "nan" not in page.text and "inf " not in page.text


def test_one_step_without_evaluation(folder):
    write(folder, "metrics.jsonl", [step(1, 0.25)])
    _, page = read(grpo_report.write(folder))
    assert "Reward in training went from 0.250 to 0.250 in 1 steps" in page.text and "eval/reward" not in page.text


def test_an_empty_folder_and_half_a_line(tmp_path):
    assert "wrote down no reward" in read(grpo_report.write(tmp_path))[1].text
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "completi')
    (tmp_path / "run.json").write_text("{")
    assert "Sampled completions" in read(grpo_report.write(tmp_path))[1].text


@pytest.mark.parametrize("name", [None, "", "samples", "../secret.png", "/etc/hostname", "run.json", 3])
def test_only_images_of_the_run_are_shown(folder, name):
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    assert grpo_report.thumbnail(folder, name) is None


def test_seeds_are_one_page_with_mean_and_spread(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.2), (7, -0.1)):
        make(tmp_path / f"seed_{seed}", gain)
    _, page = read(grpo_seeds.write(tmp_path, (0, 1, 7)))
    changes = np.array([0.1, 0.2, -0.1])
    ends = f"0.4 ± 0 to {0.4 + changes.mean():.4g} ± {changes.std(ddof=1):.2g}"
    assert f"Held-out reward went from {ends}; it rose in 2 of 3 runs" in page.text
    links = [value for _, name, value in page.attributes if name == "href"]
    assert links == ["seed_0/report.html", "seed_1/report.html", "seed_7/report.html"]
    assert "0.400 → 0.600" in page.text and "seed_7" in page.text and "0, 1, 7" in page.text


def test_seeds_without_files_are_a_page_too(tmp_path):
    make(tmp_path / "seed_0")
    for seeds in ((5, 6), (0, 5)):
        assert "Runs" in read(grpo_seeds.write(tmp_path, seeds))[1].text


def test_training_knows_where_reports_are(folder, capsys):
    run._report("run", folder)
    run._report("seeds", folder, (1,))
    assert capsys.readouterr().out.splitlines() == [f"report: {folder / 'report.html'}"] * 2
