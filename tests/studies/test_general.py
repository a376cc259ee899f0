"""What any study's rows say: at most five sentences, charts where rows carry them, laws or why there is none."""

from manyhands.studies import general
from tests.studies.made import study
from tests.studies.made_curves import Runs


def analysed(runs):
    return general.analyse(study(), runs.rows, runs.lines)


def test_five_sentences_say_speed_learning_limit_trust_and_what_went_wrong():
    runs = Runs().add().add(workers=2, speed=1.7).add("slice_own_batch", 2, speed=1.5, ends=0.9)
    runs.fail("slice_update", 2, status="refused", reason="it cannot be. Use another.")
    found = analysed(runs).sentences
    assert len(found) == 5
    assert found[0].startswith("Fastest: synchronous with 2 workers, 1.7")
    assert "[" in found[0]
    assert found[1].startswith("1 plan of 3 learns less than one worker, slice_own_batch with 2 workers")
    assert found[2] == (
        "What limits synchronous with 2 workers is computing, 60 % of its step (communicating and waiting 30 %, "
        "updating 10 %)."
    )
    assert found[3].startswith("Every plan ran 3 times")
    assert found[4] == ("1 plan was refused (strategy=slice_update, workers=2: it cannot be. Use another).")


def test_the_shares_are_drawn_where_they_are_known():
    names = {chart.name for chart in analysed(Runs().add().add(workers=2, speed=1.7)).charts}
    assert names >= {"speed-up", "step-parts", "throughput", "accuracy-by-samples", "accuracy-by-seconds"}
    assert analysed(Runs().fail()).charts == ()


def test_a_law_is_fitted_where_there_are_counts_enough():
    runs = Runs(cores=8)
    for workers in (1, 2, 4, 8):
        runs.add(workers=workers, speed=1 / (0.1 + 0.9 / workers))
    notes = "\n".join(analysed(runs).notes)
    assert "By Amdahl's law a serial fraction of 0." in notes
    assert "universal scalability law" in notes


def test_weak_scaling_asks_gustafson():
    runs = Runs(cores=8)
    for workers in (1, 2, 4, 8):
        task = {"batch_per_worker": 50}
        runs.add(workers=workers, speed=1.0, task=task, global_batch=50 * workers)
    notes = "\n".join(analysed(runs).notes)
    assert "Gustafson's law" in notes
    assert "Amdahl" not in notes


def test_what_cannot_be_fitted_is_said_once_for_all_strategies():
    runs = Runs().add().add(workers=2, speed=1.7).add("replica_average").add("replica_average", 2, speed=1.5)
    notes = [note for note in analysed(runs).notes if "Amdahl" in note]
    assert len(notes) == 1
    assert notes[0].startswith("synchronous, replica_average: Amdahl's law cannot be fitted")


def test_no_law_is_made_of_oversubscribed_plans():
    runs = Runs(cores=2)
    for workers in (1, 4, 8, 16):
        runs.add(workers=workers, speed=workers)
    assert not any("law" in note for note in analysed(runs).notes)


def test_nothing_measured_says_nothing():
    found = general.analyse(study(), [], [])
    assert (found.sentences, found.charts, found.notes) == ((), (), ())


def test_of_several_tasks_the_first_is_in_the_summary_and_the_others_in_the_notes():
    runs = Runs()
    for batch, speed in ((100, 1.7), (400, 1.9)):
        task = {"batch_size": batch}
        runs.add(task=task, global_batch=batch).add(workers=2, speed=speed, task=task, global_batch=batch)
    found = analysed(runs)
    assert found.sentences[0].startswith("Fastest: synchronous with 2 workers at batch 100, 1.7")
    assert found.notes[0].startswith("Fastest: synchronous with 2 workers at batch 400, 1.9")
    assert "as fast as one process with 1 thread at batch 400" in found.notes[0]
