"""Every mistake in a run file is one line that names the file, the key and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.utils.errors import InputError
from megaphase.utils.yaml_file import read_yaml

GOOD = """\
seed: 1
output: runs/x
tokenizer: tok
tasks:
  en: {corpus: data/en}
  hi: {corpus: data/hi}
  no: {corpus: data/no}
model: {preset: gpt-5m, seq_len: 64}
parallel: {tensor: 1}
batch: {samples: 8, micro: 2}
optimizer: {betas: [0.9, 0.95]}
phases:
  - name: pretrain
    tokens: 200e9
    mixture: {rates: {en: 1.0}}
    learning_rate: {schedule: cosine, peak: 3e-4, final: 3e-5, warmup_steps: 20}
  - name: joint
    steps: 10
    mixture: {temperature: 3.3, over: [en, hi], max_epochs: 8}
    learning_rate: {peak: 1e-4}
validation: {every_steps: 500, samples: 256, fraction: 0.01}
"""


def load(folder: Path, text: str = GOOD, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_run_file(path, overrides)


def message(folder: Path, text: str = GOOD, *overrides: str) -> str:
    """Return the InputError's message without the folder."""
    with pytest.raises(InputError) as error:
        load(folder, text, *overrides)
    said = str(error.value)
    assert "\n" not in said
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]
    return said.replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # unknown keys
        ("seed:", "sede:", "run.yaml: unknown key 'sede'; did you mean 'seed'?"),
        ("{tensor: 1}", "{Tensor: 1}",
         "run.yaml: parallel: unknown key 'Tensor'; did you mean 'tensor'?"),
        ("max_epochs", "max_epoch",
         "run.yaml: phases[1].mixture: unknown key 'max_epoch'; did you mean 'max_epochs'?"),
        ("peak: 1e-4", "peak: 1e-4, warmup: 5",
         "run.yaml: phases[1].learning_rate: unknown key 'warmup'; did you mean 'warmup_steps'?"),
        ("betas: [0.9, 0.95]", "xyz: 1",
         "run.yaml: optimizer: unknown key 'xyz'; the keys here are name, betas, eps, "
         "weight_decay, clip"),
        ("betas: [0.9, 0.95]", "name: lion, eps: 1e-8",
         "run.yaml: optimizer: unknown key 'eps'; the keys here are name, betas, weight_decay, "
         "clip"),
        ("betas: [0.9, 0.95]", "name: sgd",
         "run.yaml: optimizer: name is 'sgd'; the optimizers are adamw, adafactor, lion, muon"),
        ("betas: [0.9, 0.95]", "name: lyon",
         "run.yaml: optimizer: name is 'lyon'; did you mean 'lion'?"),
        ("betas: [0.9, 0.95]", "name: 3",
         "run.yaml: optimizer: name is 3; it is one of adamw, adafactor, lion, muon"),
        # missing keys
        ("output: runs/x\n", "", "run.yaml: output: this key is missing; add it"),
        ("batch: {samples: 8, micro: 2}\n", "", "run.yaml: batch: this key is missing; add it"),
        ("samples: 8, ", "", "run.yaml: batch.samples: this key is missing; add it"),
        (", seq_len: 64", "", "run.yaml: model.seq_len: this key is missing; add it"),
        ("hi: {corpus: data/hi}", "hi: {}",
         "run.yaml: tasks.hi: corpus is missing; add it, or tokens to plan before there is text"),
        ("hi: {corpus: data/hi}", "hi:",
         "run.yaml: tasks.hi: corpus is missing; add it, or tokens to plan before there is text"),
        ("    tokens: 200e9\n", "",
         "run.yaml: phases[0]: give exactly one of tokens, steps, epochs; found none of them"),
        ("steps: 10", "steps: 10\n    tokens: 5",
         "run.yaml: phases[1]: give exactly one of tokens, steps, epochs; found tokens and steps"),
        # wrong types
        ("{tensor: 1}", "{tensor: two}",
         'run.yaml: parallel.tensor: must be a whole number; found "two"'),
        ("{tensor: 1}", "{tensor: 1.5}",
         "run.yaml: parallel.tensor: must be a whole number; found 1.5"),
        ("{tensor: 1}", "{tensor: true}",
         "run.yaml: parallel.tensor: must be a whole number; found true"),
        ("{tensor: 1}", "{tensor: 1, sequence: maybe}",
         'run.yaml: parallel.sequence: must be true or false; found "maybe"'),
        ("{tensor: 1}", "[1]",
         "run.yaml: parallel: must be a mapping of keys to values; found a list"),
        ("3e-4", "'3e-4'",
         'run.yaml: phases[0].learning_rate.peak: must be a number; found "3e-4"'),
        ("3e-4", "true", "run.yaml: phases[0].learning_rate.peak: must be a number; found true"),
        ("peak: 1e-4", "peak:",
         "run.yaml: phases[1].learning_rate.peak: must be a number; found nothing"),
        ("temperature: 3.3", "temperature: .nan",
         'run.yaml: phases[1].mixture.temperature: must be a number; found ".nan"'),
        ("[0.9, 0.95]", "0.9", "run.yaml: optimizer.betas: must be a list; found 0.9"),
        ("over: [en, hi]", "over: en",
         "run.yaml: phases[1].mixture.over: no task has the role 'en'; for the task write [en]"),
        ("over: [en, hi]", "over: low",
         "run.yaml: phases[1].mixture.over: no task has the role 'low'; set tasks.NAME.role, or "
         "give a list of tasks"),
        ("over: [en, hi]", "over: {en: 1}",
         'run.yaml: phases[1].mixture.over: must be a role or a list of tasks; found a mapping'),
        ("over: [en, hi]", "over: [en, 5]",
         'run.yaml: phases[1].mixture.over: must be a role or a list of tasks; found a list'),
        ("over: [en, hi]", "over: []",
         "run.yaml: phases[1].mixture.over: must hold at least one entry; found an empty list"),
        ("{corpus: data/hi}", "data/hi",
         'run.yaml: tasks.hi: must be a mapping of keys to values; found "data/hi"'),
        ("corpus: data/hi", "corpus: 5", "run.yaml: tasks.hi.corpus: must be a path; found 5"),
        ("corpus: data/hi", "corpus: ''", 'run.yaml: tasks.hi.corpus: must be a path; found ""'),
        ("hi: {", "1: {", "run.yaml: tasks: the key 1 is not text; put it in quotes"),
        ("name: joint", "name: 5",
         "run.yaml: phases[1].name: must be text; put it in quotes; found 5"),
        # wrong values
        ("{en: 1.0}", "{en: 1.5, hi: -0.5}",
         "run.yaml: phases[0].mixture.rates.en: must be at most 1; found 1.5"),
        ("{en: 1.0}", "{en: 0.5, hi: 0.4}",
         "run.yaml: phases[0].mixture.rates: the rates sum to 0.9; make them sum to 1; in "
         "the same proportions: {en: 0.555556, hi: 0.444444}"),
        ("{en: 1.0}", "{en: 3, hi: 1}",
         "run.yaml: phases[0].mixture.rates: the rates sum to 4; make them sum to 1; in the "
         "same proportions: {en: 0.75, hi: 0.25}"),
        ("{en: 1.0}", "{en: 0.5, hi: 0.499998}",
         "run.yaml: phases[0].mixture.rates: the rates sum to 0.999998; make them sum to "
         "1; in the same proportions: {en: 0.500001, hi: 0.499999}"),
        ("{en: 1.0}", "{}",
         "run.yaml: phases[0].mixture.rates: the rates sum to 0; make them sum to 1"),
        ("{en: 1.0}", "{en: 0.5, hj: 0.5}",
         "run.yaml: phases[0].mixture.rates: no task 'hj' with a corpus under tasks; the tasks "
         "are en, hi, no"),
        ("{en: 1.0}", "{en: 0.5, Hi: 0.5}",
         "run.yaml: phases[0].mixture.rates: no task 'Hi' with a corpus under tasks; did you mean "
         "'hi'?"),
        ("over: [en, hi]", "over: [en, fr]",
         "run.yaml: phases[1].mixture.over: no task 'fr' with a corpus under tasks; the tasks are "
         "en, hi, no"),
        ("{rates: {en: 1.0}}", "{rates: {en: 1.0}, temperature: 2}",
         "run.yaml: phases[0].mixture: rates and temperature exclude each other; give exactly one "
         "of rates, temperature, proportional, unimax"),
        ("{rates: {en: 1.0}}", "{rates: {en: 0.5}, temperature: 2}",
         "run.yaml: phases[0].mixture: rates and temperature exclude each other; give exactly one "
         "of rates, temperature, proportional, unimax"),
        ("{rates: {en: 1.0}}", "",
         "run.yaml: phases[0].mixture: give exactly one of rates, temperature, proportional, "
         "unimax; found none of them"),
        ("{rates: {en: 1.0}}", "{rates: {en: 1.0}, over: [en]}",
         "run.yaml: phases[0].mixture: over goes with temperature, proportional and unimax, not "
         "with rates"),
        ("{rates: {en: 1.0}}", "{unimax: true}",
         "run.yaml: phases[0].mixture: unimax needs max_epochs"),
        ("{rates: {en: 1.0}}", "{proportional: yes}",
         'run.yaml: phases[0].mixture.proportional: must be true; found "yes"'),
        ("temperature: 3.3", "temperature: 0",
         "run.yaml: phases[1].mixture.temperature: must be at least 0.01; found 0"),
        ("max_epochs: 8", "max_epochs: -1",
         "run.yaml: phases[1].mixture.max_epochs: must be greater than 0; found -1"),
        ("fraction: 0.01", "fraction: 1",
         "run.yaml: validation.fraction: must be less than 1; found 1"),
        ("[0.9, 0.95]", "[0.9, 2]", "run.yaml: optimizer.betas[1]: must be less than 1; found 2"),
        ("200e9", "2.5", "run.yaml: phases[0].tokens: must be a whole number; found 2.5"),
        ("200e9", "0", "run.yaml: phases[0].tokens: must be greater than 0; found 0"),
        ("schedule: cosine", "schedule: cosin",
         "run.yaml: phases[0].learning_rate.schedule: must be 'cosine', 'linear', 'inverse_sqrt', "
         "'constant' or 'wsd'; found \"cosin\""),
        ("schedule: cosine", "schedule: wsd",
         "run.yaml: phases[0].learning_rate: decay_steps is needed by schedule wsd and by no "
         "other"),
        ("3e-4", "1e-6",
         "run.yaml: phases[0].learning_rate: final (3e-05) is above peak (1e-06); "
         "lower it"),
        ("peak: 1e-4", "peak: 1e-4, steps: 10, first_step: 10",
         "run.yaml: phases[1].learning_rate: first_step (10) is not below steps (10), the length "
         "of the whole schedule"),
        ("peak: 1e-4", "peak: 1e-4, first_step: 5",
         "run.yaml: phases[1].learning_rate: first_step needs steps, the length of the whole "
         "schedule"),
        ("peak: 1e-4", "peak: 1e-4, steps: 1100, first_step: 1095",
         "run.yaml: phases[1]: the phase ends at step 1,105 of its schedule "
         "(learning_rate.first_step 1,095 + steps 10), beyond learning_rate.steps (1,100); make it "
         "1,105 or more"),
        ("seq_len: 64", "seq_len: 64, dropout: 1.0",
         "run.yaml: model.dropout: must be less than 1; found 1.0"),
        ("name: joint", "name: pretrain",
         "run.yaml: phases[1].name: 'pretrain' occurs twice; give every phase its own name"),
        ("name: joint", "name: a/b",
         "run.yaml: phases[1].name: the name 'a/b' contains '/'; use letters, digits, '_', '.' and "
         "'-', at most 100 bytes"),
        ("micro: 2", "micro: 3", "run.yaml: batch: micro (3) does not divide samples (8)"),
        ("{tensor: 1}", "{sequence: true}",
         "run.yaml: parallel: sequence: true needs tensor greater than 1"),
        ("{tensor: 1}", "{zero: 2, keep_gathered: 0.5}",
         "run.yaml: parallel: keep_gathered needs zero 3 and offload_parameters: none"),
        ("{tensor: 1}", "{keep_gathered: 1.0, offload: cpu, offload_parameters: cpu}",
         "run.yaml: parallel: keep_gathered needs zero 3 and offload_parameters: none"),
        ("{tensor: 1}", "{keep_gathered: 1.5}",
         "run.yaml: parallel.keep_gathered: must be at most 1; found 1.5"),
        *(("{tensor: 1}", f"{{secondary_partition: 2, {other}}}",
           "run.yaml: parallel: secondary_partition needs zero 3, tensor 1 and "
           "offload_parameters: none")
          for other in ("zero: 2", "tensor: 2", "offload: cpu, offload_parameters: cpu")),
        ("{tensor: 1}", "{secondary_partition: 1}",
         "run.yaml: parallel.secondary_partition: must be at least 2; found 1"),
        ("{tensor: 1}", "{zero: 4}", "run.yaml: parallel.zero: must be 0, 1, 2 or 3; found 4"),
        # weights of losses
        ("hi: {corpus: data/hi}", "hi: {corpus: data/hi, loss_weight: -1}",
         "run.yaml: tasks.hi.loss_weight: must be at least 0; found -1"),
        ("name: joint", "name: joint\n    loss_weights: {fr: 1}",
         "run.yaml: phases[1].loss_weights: no task 'fr' with a corpus under tasks; the tasks are "
         "en, hi, no"),
        ("name: joint", "name: joint\n    loss_weights: {no: 2}",
         "run.yaml: phases[1].loss_weights: joint has 'no' at rate 0, so a weight has no effect; "
         "leave it out, or give the task a rate in the phase's mixture"),
        ("name: joint", "name: joint\n    loss_weights: {en: 0, hi: 0}",
         "run.yaml: phases[1].loss_weights: the tasks that joint samples, en, hi, all have the "
         "weight 0; give one of them a weight above 0, here or as tasks.NAME.loss_weight"),
        ("betas: [0.9, 0.95]}", "name: lion}\nparts: {optimizer: apex}",
         "run.yaml: parts.optimizer: apex has adamw alone, and optimizer.name is lion; write auto "
         "or torch"),
        ("name: joint", "name: joint\n    loss_weights: {en: 1e-300}",
         "run.yaml: phases[1].loss_weights.en: 1e-300 is less than 1e-06 times the largest weight "
         "in joint, 1 of hi; write a larger one, or 0, with which the task trains nothing"),
        ("hi: {corpus: data/hi}", "hi: {corpus: data/hi, loss_weight: 2e6}",
         "run.yaml: tasks.en.loss_weight: 1 is less than 1e-06 times the largest weight in "
         "joint, 2e+06 of hi; write a larger one, or 0, with which the task trains nothing"),
        # the model of a phase
        ("name: joint", "name: joint\n    model: {seq_len: 128, layers: 2}",
         "run.yaml: phases[1].model: unknown key 'layers'; the keys here are seq_len, rotary_base, "
         "rotary_scaling, sliding_rotary"),
        ("name: joint", "name: joint\n    model: {sliding_rotary: {base: 1e4}}",
         "run.yaml: phases[1].model.sliding_rotary: needs model.sliding_window; give that, or "
         "leave this out"),
        # lengths, ends and the monitor
        ("steps: 10", "epochs: {}",
         "run.yaml: phases[1].epochs: must hold at least one entry; found an empty mapping"),
        ("steps: 10", "epochs: {hi: 0}",
         "run.yaml: phases[1].epochs.hi: must be greater than 0; found 0"),
        ("tokens: 200e9", "epochs: {fr: 1}",
         "run.yaml: phases[0].epochs: no task 'fr' with a corpus under tasks; the tasks are en, "
         "hi, no"),
        ("steps: 10", "epochs: {hi: 1}",
         "run.yaml: phases[1]: epochs does not go with mixture.max_epochs, whose rates depend on "
         "the length; give tokens or steps"),
        ("steps: 10", "steps: 10\n    stop: {overfit: {tasks: [fr]}}",
         "run.yaml: phases[1].stop.overfit.tasks: no task 'fr' with a corpus under tasks; the "
         "tasks are en, hi, no"),
        ("steps: 10", "steps: 10\n    stop: {overfit: {tasks: low}}",
         "run.yaml: phases[1].stop.overfit.tasks: no task has the role 'low'; set "
         "tasks.NAME.role, or give a list of tasks"),
        ("steps: 10", "steps: 10\n    stop: {overfit: {tasks: [hi], when: some}}",
         "run.yaml: phases[1].stop.overfit.when: must be 'all' or 'any'; found \"some\""),
        ("steps: 10", "steps: 10\n    stop: {loss: {fr: 1}}",
         "run.yaml: phases[1].stop.loss: no task 'fr' with a corpus under tasks; the tasks are "
         "en, hi, no"),
        ("seed: 1", "monitor: {tasks: [fr]}",
         "run.yaml: monitor.tasks: no task 'fr' with a corpus under tasks; the tasks are en, hi, "
         "no"),
        ("seed: 1", "monitor: {weights: {hi: 1}}",
         "run.yaml: monitor.weights: there are no monitor.tasks; name them, too"),
        ("seed: 1", "monitor: {tasks: [hi, no], weights: {hi: 1, en: 2}}",
         "run.yaml: monitor.weights.en: en is none of monitor.tasks, which are hi, no; add it to "
         "them, or leave it out here"),
        ("  no: {corpus: data/no}", "  mean: {corpus: data/no}\nmonitor: {tasks: [mean]}",
         "run.yaml: monitor.tasks: 'mean' is also what the best weighted mean is kept as; rename "
         "the task"),
        # not YAML, or not quite
        ("seed: 1", "seed: 1\nseed: 2", "run.yaml:2: the key 'seed' occurs twice"),
        ("hi: {", "en: {", "run.yaml:6: the key 'en' occurs twice"),
        ("{en: 1.0}", "{en: 0.5, en: 0.5}", "run.yaml:15: the key 'en' occurs twice"),
        ("seed: 1", "seed: [1",
         "run.yaml:2: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("seed: 1", "\tseed: 1",
         "run.yaml:1: while scanning for the next token, found character '\\t' that cannot start "
         "any token"),
        ("seed: 1", "? [a]\n: 1",
         "run.yaml:1: while constructing a mapping, found unhashable key"),
        ("seed: 1", "seed: *nope", "run.yaml:1: found undefined alias 'nope'"),
        ("seed: 1", "seed: !!int many",
         "run.yaml: a value cannot be read (invalid literal for int() with base 10: 'many'); look "
         "for tags such as !!map, and for numbers of very many digits"),
        (GOOD, "", "run.yaml: the file must contain a mapping of keys to values"),
        (GOOD, "- a", "run.yaml: the file must contain a mapping of keys to values"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, old, new, said):
    assert GOOD.count(old) >= 1
    assert message(tmp_path, GOOD.replace(old, new, 1)) == said


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (
            "{seq_len: 65}",
            "phases[1].model.seq_len: is 65, but there are learned positions for model.seq_len 64 "
            "alone; lower it, or use rotary positions",
        ),
        (
            "{rotary_base: 5e5}",
            "phases[1].model.rotary_base: positions are learned; leave it out",
        ),
    ],
)
def test_learned_positions_end_at_the_seq_len_of_the_model_section(tmp_path, phase, said):
    text = GOOD.replace("seq_len: 64", "seq_len: 64, position: learned")
    assert message(tmp_path, text, f"phases.1.model={phase}") == f"run.yaml: {said}"


def test_a_phase_has_the_keys_of_the_model_section_beside_its_own(tmp_path):
    config = load(tmp_path, GOOD, "phases.1.model={seq_len: 256, rotary_base: 5e5}")
    assert config.phase_model(0) == config.model
    own = config.phase_model(1)
    assert (own.seq_len, own.rotary_base) == (256, 5e5)
    assert own.model_copy(update={"seq_len": 64, "rotary_base": None}) == config.model


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "override 'seed': this is not key.path=value"),
        ("=5", "override '=5': this is not key.path=value"),
        ("sede=5", "run.yaml: unknown key 'sede'; did you mean 'seed'?"),
        ("seed.a=5", "override 'seed.a=5': seed in run.yaml holds no keys"),
        ("parallel.tensor=two", 'run.yaml: parallel.tensor: must be a whole number; found "two"'),
        ("checkpoint.kep=5", "run.yaml: checkpoint: unknown key 'kep'; did you mean 'keep'?"),
        (
            "phases.2.steps=9",
            "override 'phases.2.steps=9': phases in run.yaml is a list of 2; name an entry by its "
            "number, from 0",
        ),
        (
            "phases.joint.steps=9",
            "override 'phases.joint.steps=9': phases in run.yaml is a list of 2; name an entry by "
            "its number, from 0",
        ),
        (
            "phases.0.mixture.rates.hi=0.5",
            "run.yaml: phases[0].mixture.rates: the rates sum to 1.5; make them sum to 1; in "
            "the same proportions: {en: 0.666667, hi: 0.333333}",
        ),
        (
            "phases.0.learning_rate.peak=",
            "run.yaml: phases[0].learning_rate.peak: must be a number; found nothing",
        ),
    ],
)
def test_a_mistake_in_an_override_is_one_line(tmp_path, override, said):
    assert message(tmp_path, GOOD, override) == said


def test_a_key_of_very_many_parts_is_refused_at_once(tmp_path):
    said = message(tmp_path, GOOD, "a." * 5000 + "a=5")
    assert said.startswith("override 'a.a.")
    assert said.endswith(": a key has at most 100 parts, this has 5001")


def test_overrides_replace_values_before_they_are_checked(tmp_path):
    config = load(
        tmp_path,
        GOOD,
        "phases.0.learning_rate.peak=1e-3",
        "phases[1].steps=1e3",
        "checkpoint.keep=5",
        "tasks.fr.corpus=data/fr",
        "phases.0.mixture={rates: {en: 0.5, no: 0.5}}",
        "output=../other",
    )
    assert config.phases[0].learning_rate.peak == 1e-3
    assert config.phases[1].steps == 1000
    assert config.checkpoint.keep == 5
    assert config.tasks["fr"].corpus == tmp_path / "data/fr"
    assert config.phases[0].mixture.rates == {"en": 0.5, "no": 0.5}
    assert config.output.resolve() == tmp_path.parent / "other"


def test_the_optimizer_name_of_earlier_versions_is_accepted(tmp_path):
    config = load(tmp_path, GOOD.replace("betas: [0.9, 0.95]", "name: adamw"))
    assert config.optimizer == load(tmp_path, GOOD).optimizer
    assert "name" not in config.model_dump()["optimizer"]


def test_yaml_is_read_as_its_version_1_2(tmp_path):
    config = load(tmp_path)
    assert list(config.tasks) == ["en", "hi", "no"]
    assert config.phases[0].tokens == 200_000_000_000
    assert config.phases[0].learning_rate.peak == 0.0003
    path = tmp_path / "values.yaml"
    path.write_text(
        "{a: yes, b: off, c: 010, d: 09, e: 1_000, f: 1e3, g: -.5, h: 1:30, i: 2020-01-01,"
        " j: true, k: ~, l: 0x10, m: 3., n: +4}"
    )
    assert read_yaml(path) == {
        "a": "yes", "b": "off", "c": 10, "d": 9, "e": 1000, "f": 1000.0, "g": -0.5, "h": "1:30",
        "i": "2020-01-01", "j": True, "k": None, "l": "0x10", "m": 3.0, "n": 4,
    }  # fmt: skip


def test_anchors_and_merge_keys_work(tmp_path):
    text = (
        GOOD.replace("steps: 10\n", "steps: 20\n")
        .replace("peak: 1e-4}", "<<: *shared, peak: 1e-4}")
        .replace("learning_rate: {schedule", "learning_rate: &shared {schedule")
    )
    shared = load(tmp_path, text).phases[1].learning_rate
    assert [shared.peak, shared.final, shared.warmup_steps] == [1e-4, 3e-5, 20]


def test_empty_sections_take_their_defaults(tmp_path):
    text = GOOD.replace("{tensor: 1}", "").replace("{betas: [0.9, 0.95]}", "")
    config = load(tmp_path, text)
    assert config.parallel.zero == 3
    assert config.optimizer.betas == (0.9, 0.95)


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load(tmp_path, GOOD.replace("data/hi", "/elsewhere/hi").replace("tok\n", "~/tok\n"))
    assert config.output == tmp_path / "runs/x"
    assert config.tasks["en"].corpus == tmp_path / "data/en"
    assert config.tasks["hi"].corpus == Path("/elsewhere/hi")
    assert config.tokenizer == Path.home() / "tok"
    assert config.where("seed") == f"{tmp_path}/run.yaml: seed"


def test_a_rate_may_be_zero_and_rates_may_be_rounded(tmp_path):
    text = GOOD.replace("{en: 1.0}", "{en: 0.3333333, hi: 0.6666667, no: 0}")
    assert load(tmp_path, text).phases[0].mixture.rates["no"] == 0


def test_a_monitor_may_name_tasks_by_a_role(tmp_path):
    text = GOOD.replace("{corpus: data/hi}", "{corpus: data/hi, role: low}")
    monitor = "monitor: {tasks: low, weights: {hi: 2}}"
    assert load(tmp_path, f"{text}{monitor}\n").monitor.weights == {"hi": 2}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "no such file; give the path of a run file"),
        (Path.mkdir, "cannot be read (Is a directory); give the path of a run file"),
        (lambda path: path.write_bytes(b"seed: \xff"), "this is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, prepare, said):
    path = tmp_path / "run.yaml"
    prepare(path)
    with pytest.raises(InputError) as error:
        load_run_file(path)
    assert str(error.value) == f"{path}: {said}"


def test_loss_weights_are_relative_to_the_largest_of_a_sampled_task(tmp_path):
    config = load(
        tmp_path,
        GOOD.replace("hi: {corpus: data/hi}", "hi: {corpus: data/hi, loss_weight: 4}"),
        "tasks.no.loss_weight=1e9",
    )
    assert config.relative_loss_weights(0) == [1.0, 1.0, 1.0]
    assert config.relative_loss_weights(1) == [0.25, 1.0, 1.0]


def test_the_ramp_must_fit_the_phases_that_it_reaches_alone(tmp_path):
    ramp = "batch: {tokens: 1024, ramp: {from: 64, step: 64, tokens: TOKENS}}"
    text = GOOD.replace("batch: {samples: 8, micro: 2}", ramp).replace(
        "name: joint", "name: joint\n    model: {seq_len: 128}"
    )
    over = text.replace("TOKENS", "200e9")
    batch = load(tmp_path, over).phase_batch(1)
    assert (batch.samples, batch.ramp) == (8, None)
    by_steps = text.replace("TOKENS", "15360").replace("tokens: 200e9", "steps: STEPS")
    ramped = load(tmp_path, by_steps.replace("STEPS", "60")).phase_batch(0).schedule(0)
    steps = ramped.stages[-1].first_step
    load(tmp_path, by_steps.replace("STEPS", str(steps)).replace("warmup_steps: 20", ""))
    said = (
        "run.yaml: batch.ramp.from: 64 is not a multiple of seq_len 128 in joint; write 128, which "
        "fits all phases, or give phases[1].batch its own tokens"
    )
    for reached in [
        by_steps.replace("STEPS", str(steps - 1)).replace("warmup_steps: 20", ""),
        text.replace("TOKENS", "201e9"),
        over.replace("\n    tokens: 200e9", "\n    epochs: {en: 1}"),
    ]:
        assert message(tmp_path, reached) == said


def test_a_batch_in_tokens_is_proposed_that_fits_all_phases(tmp_path):
    text = GOOD.replace("batch: {samples: 8, micro: 2}", "batch: {tokens: 1000}").replace(
        "name: joint", "name: joint\n    model: {seq_len: 96}"
    )
    said = message(tmp_path, text)
    assert said == (
        "run.yaml: batch.tokens: 1,000 is not a multiple of seq_len 64 in pretrain; write 960 or "
        "1,152, which fits all phases, or give phases[0].batch its own tokens"
    )
    assert load(tmp_path, text, "batch.tokens=1152").phase_batch(1).samples == 12
    assert load(tmp_path, text, "batch.tokens=960", "phases.1.batch.tokens=96")
