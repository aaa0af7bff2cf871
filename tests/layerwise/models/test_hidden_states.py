"""Storage for hidden states, in memory and in files."""

import errno
import os

import pytest
import torch

from layerwise.models.hidden_states import HiddenStatesRoom, batches


def test_a_batch_contains_the_windows_of_one_forward_pass(monkeypatch):
    monkeypatch.setattr("layerwise.models.hidden_states.TOKENS_PER_FORWARD", 7)
    assert [len(batch) for batch in batches(torch.zeros(5, 3))] == [2, 2, 1]
    assert [len(batch) for batch in batches(torch.zeros(5, 7, 2))] == [1] * 5


def test_a_window_longer_than_a_batch_is_a_batch_of_its_own(monkeypatch):
    monkeypatch.setattr("layerwise.models.hidden_states.TOKENS_PER_FORWARD", 7)
    assert [batch.shape for batch in batches(torch.zeros(2, 8))] == [(1, 8), (1, 8)]


def test_zero_windows_give_zero_batches():
    assert batches(torch.zeros(0, 3, 2)) == ()


def test_batches_are_views_in_order():
    windows = torch.arange(6000).reshape(3, 2000)
    for number, batch in enumerate(batches(windows)):
        batch.fill_(number)
    assert windows[:, 0].tolist() == windows[:, -1].tolist() == [0, 0, 1]


def test_within_the_budget_the_disk_is_not_used(tmp_path):
    room = HiddenStatesRoom(budget=240, folder=tmp_path / "scratch")
    tensor = room.empty((3, 10, 2), torch.float32)
    assert tensor.shape == (3, 10, 2)
    assert room.spilled == 0
    assert not (tmp_path / "scratch").exists()


def test_tensors_beyond_the_budget_are_in_files_without_a_name(tmp_path):
    room = HiddenStatesRoom(budget=100, folder=tmp_path / "new" / "scratch")
    tensors = [room.empty((5, 5), torch.bfloat16) for _ in range(4)]
    assert room.spilled == 2 * 50
    assert list((tmp_path / "new" / "scratch").iterdir()) == []
    assert all(tensor.shape == (5, 5) and tensor.dtype == torch.bfloat16 for tensor in tensors)


def test_a_small_tensor_still_fits_after_a_large_one_was_spilled(tmp_path):
    room = HiddenStatesRoom(budget=100, folder=tmp_path)
    room.empty((200,), torch.uint8)
    room.empty((100,), torch.uint8)
    assert room.spilled == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spilled_tensors_do_not_affect_each_other(tmp_path, dtype):
    room = HiddenStatesRoom(budget=0, folder=tmp_path)
    generator = torch.Generator().manual_seed(0)
    written = [torch.randn(4, 128, 32, generator=generator).to(dtype) for _ in range(3)]
    tensors = [room.empty((4, 128, 32), dtype) for _ in written]
    for tensor, values in zip(tensors, written, strict=True):
        for batch, some_values in zip(batches(tensor), batches(values), strict=True):
            batch.copy_(some_values)
    assert all(torch.equal(tensor, values) for tensor, values in zip(tensors, written, strict=True))


def test_an_empty_tensor_needs_no_memory(tmp_path):
    room = HiddenStatesRoom(budget=0, folder=tmp_path)
    assert room.empty((0, 16, 32), torch.float32).shape == (0, 16, 32)
    assert room.spilled == 0


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    def full(_descriptor: int, _offset: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    room = HiddenStatesRoom(budget=0, folder=tmp_path)
    with pytest.raises(
        OSError, match=r"0\.50 GiB of hidden states do not fit in .*Free disk space"
    ) as caught:
        room.empty((2, 1 << 28), torch.uint8)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert room.spilled == 0


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        HiddenStatesRoom(budget=0, folder=tmp_path / "file").empty((1,), torch.uint8)
