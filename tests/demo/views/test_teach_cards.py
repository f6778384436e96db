"""The progress of a training, its result, and the requests of the view Teach."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from aoft_demo.actions.train import Plan, TrainingProgress
from aoft_demo.actions.training_data import Example
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_demo.views.teach import view
from aoft_demo.views.teach.cards import answer_card, progress_card, result_card, waiting_card
from aoft_deploy.classes import Prediction, Value
from aoft_deploy.errors import SettingError
from aoft_deploy.training.settings import TrainingSettings

PLAN = Plan(TrainingSettings(epochs=4, backbone="aoft_vit_nano"), 16, 4, 8)
ID = "a" * 32


def progress(val: list[float], test: float | None = None) -> TrainingProgress:
    """A training after some epochs, with these accuracies of the pictures kept aside."""
    lines = tuple({"train_accuracy": 1.0, "val_accuracy": x, "seconds": 1.0} for x in val)
    return TrainingProgress(PLAN, lines, test, None, 12.4, 1.0)


def test_the_best_round_so_far_is_told() -> None:
    html = progress_card("a", progress([0.5, 0.75, 0.25]))
    assert "Best so far: right on 3 of 4 pictures kept aside." in html
    assert 'aria-valuenow="75"' in html
    assert "1 training before yours" in waiting_card(1) and "2 trainings" in waiting_card(2)


def test_a_result_without_a_test_says_that_it_flatters() -> None:
    html = result_card("a b/ü", progress([0.5, 1.0, 0.75]))
    assert "right on 4 of 4 pictures" in html and 'data-accuracy="1.000000">100%<' in html
    assert "flatters" in html and 'href="#take-home/a%20b%2F%C3%BC"' in html
    html = result_card("a", progress([0.5, 1.0], test=0.875))
    assert "right on 7 of 8 pictures" in html and "flatters" not in html
    assert 'data-accuracy="0.875000"' in html and "It learned from 16 pictures; 4 others" in html


def test_the_trials_answer_is_the_first_one() -> None:
    html = answer_card("a", [Prediction("x", 0.7), Prediction("y", 0.3)])
    assert 'role="status">x</div>' in html
    assert re.findall(r'data-label="(\w)" data-p="([\d.]+)"', html) == [
        ("x", "0.700000"),
        ("y", "0.300000"),
    ]
    assert "no label" in answer_card("a", []) and "age 3" in answer_card("a", [Value("age", 3.0)])


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads" / "x").mkdir(parents=True)
    return tmp_path / "uploads" / "x"


def picture(path: Path) -> str:
    Image.new("RGB", (8, 8), "red").save(path)
    return str(path)


def test_a_request_uses_and_deletes_the_views_own_uploads_only(
    session: Session, uploads: Path
) -> None:
    own = picture(uploads / f"teach-{ID}.png")
    others, host = picture(uploads / "other.png"), picture(uploads.parents[1] / "host.png")
    wanted = [{"id": ID, "path": own, "name": "a.png"}]
    wanted += [{"id": "b" * 32, "path": path, "name": "b.png"} for path in (others, host)]
    reply = json.loads(view._keep(session, {"number": 3, "add": wanted, "remove": []}))
    assert (reply["number"], reply["kept"], list(reply["refused"])) == (3, [ID], ["b" * 32])
    kept = session.folder / "pictures" / f"{ID}.png"
    assert kept.is_file() and not Path(own).exists()
    assert Path(others).exists() and Path(host).exists()
    reply = json.loads(view._keep(session, {"number": 4, "remove": [ID, "../../other"]}))
    assert (reply["kept"], reply["refused"]) == ([], {}) and not kept.exists()
    assert json.loads(view._keep(session, "odd")) == {"number": None, "kept": [], "refused": {}}


def test_the_trial_asks_the_new_skill(session: Session, uploads: Path) -> None:
    path = uploads / f"teach-{ID}.jpg"
    for skill in ("shape", "colour"):
        path.write_bytes((BUNDLED / "star.jpg").read_bytes())
        data = {"number": 7, "path": str(path), "name": "star.jpg", "skill": skill}
        reply = json.loads(view._attempt(session, data))
        assert reply["number"] == 7 and f'data-task="{skill}"' in reply["html"]
        labels = set(re.findall(r'data-label="([^"]+)"', reply["html"]))
        assert labels and labels <= set(session.tasks[skill].classes)
        assert not path.exists()
    path.write_bytes(b"odd")
    html = json.loads(view._attempt(session, data))["html"]
    assert "No answer" in html and "star.jpg" in html and ID not in html and not path.exists()


def test_odd_classes_are_refused_in_words() -> None:
    one, two = "a" * 32, "b" * 32
    sent = [{"name": "x", "pictures": [[one, 0]]}, {"name": "y", "pictures": [[two, 3]]}]
    assert view._classes(json.dumps(sent)) == [
        ("x", [Example(one, 0)]),
        ("y", [Example(two, 3)]),
    ]
    sent[1]["pictures"] = [[one, 0]]
    with pytest.raises(SettingError, match="A picture is in two classes"):
        view._classes(json.dumps(sent))
    with pytest.raises(SettingError, match="something else than classes"):
        view._classes("[7]")


def test_the_next_name_is_free(session: Session) -> None:
    assert view._next_name(session, "My skill") == "My skill 2"
    for number in (2, 3):
        session.tasks[f"My skill {number}"] = session.tasks["shape"]
    assert view._next_name(session, "My skill 2") == "My skill 4"
    assert len(view._next_name(session, "x" * 40)) <= 40
