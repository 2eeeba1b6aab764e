import math

import pytest
import torch

from medvision.logger import HistoryLogger, read_history


def log_run(path, *calls):
    logger = HistoryLogger(path)
    for epoch, step, metrics in calls:
        logger.log_metrics(metrics | {"epoch": epoch}, step)


def test_a_row_for_each_number_with_epochs_from_1(tmp_path):
    path = tmp_path / "metrics.csv"
    log_run(path, (0, 9, {"train/loss": torch.tensor(0.5), "lr": 1e-3}), (1, 19, {"val/dice": 0.1 + 0.2}))
    assert path.read_text().splitlines()[:2] == ["epoch,step,metric,value", "1,9,train/loss,0.5"]
    assert read_history(path) == [(1, 9, "train/loss", 0.5), (1, 9, "lr", 1e-3), (2, 19, "val/dice", 0.1 + 0.2)]


def test_every_row_is_on_the_disk_at_once(tmp_path):
    path, logger = tmp_path / "metrics.csv", HistoryLogger(tmp_path / "metrics.csv")
    for step in range(3):
        logger.log_metrics({"epoch": 0, "lr": 1.0}, step)
        assert len(read_history(path)) == step + 1


def test_what_is_not_finite_is_kept(tmp_path):
    log_run(tmp_path / "metrics.csv", (0, 0, {"train/loss": float("nan"), "val/loss": float("inf")}))
    (*_, first), (*_, second) = read_history(tmp_path / "metrics.csv")
    assert math.isnan(first) and second == math.inf


@pytest.mark.parametrize(
    ("first_step", "kept"),
    [(4, [0, 2]), (5, [0, 2, 4]), (2, [0]), (0, []), (100, [0, 2, 4, 6])],
)
def test_a_resumed_run_takes_back_what_it_repeats(tmp_path, first_step, kept):
    path = tmp_path / "metrics.csv"
    log_run(path, *((0, step, {"train/loss": step / 3}) for step in (0, 2, 4, 6)))
    log_run(path, (1, first_step, {"train/loss": 9.0}), (1, first_step + 1, {"train/loss": 8.0}))
    expected = [(1, step, "train/loss", step / 3) for step in kept]
    new = [(2, first_step, "train/loss", 9.0), (2, first_step + 1, "train/loss", 8.0)]
    assert read_history(path) == expected + new


def test_several_rows_of_one_step_stay_after_resumption(tmp_path):
    path = tmp_path / "metrics.csv"
    log_run(path, (0, 3, {"lr": 1.0}))
    log_run(path, (0, 4, {"lr": 2.0}), (0, 4, {"val/loss": 3.0}))
    assert [row[1:] for row in read_history(path)] == [(3, "lr", 1.0), (4, "lr", 2.0), (4, "val/loss", 3.0)]


@pytest.mark.parametrize("torn", ["2,5,val/lo", "2,5,val/loss,0.12", "2", "2,5,"])
def test_a_half_written_last_row_is_left_out_and_overwritten(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    log_run(path, (0, 1, {"val/loss": 0.5}))
    with path.open("a") as handle:
        handle.write(torn)
    assert read_history(path) == [(1, 1, "val/loss", 0.5)]
    log_run(path, (1, 5, {"val/loss": 0.25}))
    assert read_history(path) == [(1, 1, "val/loss", 0.5), (2, 5, "val/loss", 0.25)]


@pytest.mark.parametrize("content", ["", "epoch,st", "epoch,step,metric,value\n"])
def test_a_file_without_a_row_is_begun_again(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    assert read_history(path) == []
    log_run(path, (0, 0, {"lr": 1.0}))
    assert path.read_text() == "epoch,step,metric,value\n1,0,lr,1.0\n"


def test_a_class_name_with_a_comma_survives_resumption(tmp_path):
    path, name = tmp_path / "metrics.csv", 'val/dice/globules, "brown"'
    log_run(path, (0, 1, {name: 0.5}))
    log_run(path, (1, 2, {name: 0.75}))
    assert read_history(path) == [(1, 1, name, 0.5), (2, 2, name, 0.75)]


def test_no_file_has_no_rows(tmp_path):
    assert read_history(tmp_path / "metrics.csv") == []
    HistoryLogger(tmp_path / "metrics.csv").log_hyperparams({"lr": 1})
    assert not (tmp_path / "metrics.csv").exists()
