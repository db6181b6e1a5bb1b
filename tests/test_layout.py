"""Layouts: who predicts what, where positions stand, what is gathered."""
import pytest
import torch

from ardm_course.layout import Layout, Slot, lay_out, rope_positions


@pytest.mark.parametrize("text,patches,prompt,speaker", [(1, 1, 0, False), (5, 4, 0, True), (8, 4, 3, False), (3, 7, 2, True)])
def test_offline_predicts_each_patch_from_the_position_before(text, patches, prompt, speaker):
    plan = Layout.offline(text, patches, prompt, speaker)
    assert len(plan.predicting) == patches
    assert all(plan.slots[i + 1] == Slot.SPEECH for i in plan.predicting)
    assert plan.predicting[0] == speaker + text + prompt  # the turn, or the last given patch


def test_fill_never_predicts():
    T, S, F = Slot.TEXT, Slot.SPEECH, Slot.FILL
    plan = Layout((T, T, S, S, S, F, T, T, S, S, S, F, T, Slot.TURN, S, S, S))
    assert plan.predicting == [1, 2, 3, 7, 8, 9, 13, 14, 15]


def test_positions_follow_the_text():
    plan = Layout.offline(6, 3, prompt=1)
    assert rope_positions(plan).tolist() == list(range(11))
    assert rope_positions(plan, 2.0).tolist() == [0, 1, 2, 3, 4, 5, -1, 1, 3, 5, 7]


def test_prompt_and_speech_count_on_in_the_table():
    rows = lay_out(Layout.offline(2, 2, prompt=1, speaker=True), {Slot.SPEAKER: 10, Slot.TEXT: 20, Slot.SPEECH: 30})
    assert rows.tolist() == [10, 20, 21, int(Slot.TURN), 30, 31, 32]
    assert rows.dtype == torch.long
