"""What a checkpoint belongs to, and what of it has changed."""

import sys

import pytest
from omegaconf import OmegaConf

from rltoken import identity
from rltoken.errors import UserError


def test_what_has_changed_is_named():
    digests = ("data", "eval_data", "frozen", "problems")
    then = {"weights_only": True, "processes": 1, **dict.fromkeys(digests, "a"), "code": {"x.py": "1"}}
    now = {"processes": 2, **dict.fromkeys(digests, "b"), "code": {"x.py": "2", "y.py": "1"}}
    assert identity.changed(then, now) == [
        "it has no state of the optimizer (trainer.save_only_model)",
        "it was written by 1 processes and there are 2",
        "the training data are others than then",
        "the evaluation data are others than then",
        "the weights that are not trained (an adapter's base, the reference, the teacher) are others than then",
        "the problems evaluated before and after are others than then",
        "x.py is not as it was",
        "y.py is not as it was",
    ]


def test_what_is_not_known_is_not_changed():
    then = {"processes": 1, "data": None, "versions": {"torch": "1"}}
    assert identity.changed(then, {"data": "b", "frozen": "b", "versions": None, "settings": {"seed": 1}}) == []
    assert identity.changed(then | {"data": "b"}, {"data": "b", "versions": {"torch": "1"}}) == []


def test_settings_are_compared_with_their_order_where_that_counts():
    first = OmegaConf.create({"seed": 0, "resume": None, "method": {"shapes": {"a": {"x": 1}, "b": {"y": 2}}}})
    second = OmegaConf.create({"seed": 0, "resume": "auto", "method": {"shapes": {"b": {"y": 2}, "a": {"x": 1}}}})
    third = OmegaConf.create({"method": {"shapes": {"a": {"x": 1}, "b": {"y": 2}}}, "seed": 0})
    old, turned, moved = map(identity.settings, (first, second, third))
    assert identity.changed_settings(old, turned) == ["the order of method is another"]
    assert identity.changed_settings(old, moved) == [] == identity.changed_settings(old, old)
    assert identity.changed_settings(old, old | {"seed": 1}) == ["seed was 0 and is 1"]


def test_many_changes_are_not_all_named():
    with pytest.raises(UserError, match="x does not fit: 0; 1; 2; 3; 4; and 2 more; go back"):
        identity.accept_or_refuse("x", list("0123456"), "refuse")
    identity.accept_or_refuse("x", [], "refuse")


def test_the_digest_of_rows_sees_order_and_values():
    rows = [{"prompt": [{"role": "user", "content": "a"}], "answer": ["1"]}, {"prompt": "b", "answer": ["2"]}]
    known = identity.digest_of_rows(rows)
    assert known == identity.digest_of_rows([dict(reversed(row.items())) for row in rows])
    assert known not in (identity.digest_of_rows(rows[::-1]), identity.digest_of_rows(rows[:1]))


def test_a_users_own_code_is_known_by_its_source(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").write_text("")
    (tmp_path / "own_package/rewards.py").write_text("def f(): return 1")
    (tmp_path / "own_module.py").write_text("class A: pass")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("own_module.A", "own_package.rewards.f", "own_module.A.method", "torch.nn.Linear", "functools.partial")
    targets = {str(i): {"_target_": name} for i, name in enumerate((*names, "rltoken.tiny.accuracy", "no_such.thing"))}
    before = identity.code(OmegaConf.create(targets))
    assert before.keys() == {"own_module.py", "rewards.py"}
    (tmp_path / "own_package/rewards.py").write_text("def f(): return 2")
    after = identity.code(OmegaConf.create(targets))
    assert before["own_module.py"] == after["own_module.py"] and before["rewards.py"] != after["rewards.py"]
    assert "own_package.rewards" not in sys.modules, "looking does not run it"


def test_versions_know_our_own_code():
    found = identity.versions()
    assert {"torch", "trl", "peft", "math-verify"} <= found.keys() and "+" in found["rltoken"]
