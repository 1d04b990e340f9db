"""Weight files that are missing or not whole are found by their headers."""

import json
import struct
import zipfile

import pytest
from conftest import MODELS

from vllm_tokentiming.vllm.weights import check_weights, weight_bytes


def write(file, dtype="F32", numbers=6, cut=0, name="a"):
    size = {"F32": 4, "BF16": 2, "I8": 1}[dtype] * numbers
    tensors = {"__metadata__": {"format": "pt"}, name: {"dtype": dtype, "shape": [numbers], "data_offsets": [0, size]}}
    header = json.dumps(tensors).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(size)
    file.write_bytes(content[: len(content) - cut])
    return file


def write_index(folder, names, file="model.safetensors.index.json"):
    folder.joinpath(file).write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))


def refusal(folder, load_format="auto"):
    with pytest.raises(ValueError) as caught:
        check_weights(folder, load_format)
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message


def test_whole_weights_are_accepted():
    assert check_weights(MODELS / "draft") == [MODELS / "draft" / "model.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path):
    tmp_path.joinpath("config.json").write_text("{}")
    assert "there are no weights in that folder" in refusal(tmp_path)


def test_only_weights_of_the_load_format_count(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"x")
    assert check_weights(tmp_path) == [tmp_path / "pytorch_model.bin"]
    assert "there are no weights" in refusal(tmp_path, "safetensors")


@pytest.mark.parametrize("cut", [1, 24, 60, 10**9])
def test_a_safetensors_file_that_is_cut_is_refused(tmp_path, cut):
    file = write(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - cut)])
    assert "copy it again" in refusal(tmp_path) and "model.safetensors" in refusal(tmp_path)


def test_a_safetensors_file_that_is_too_long_is_refused_with_both_sizes(tmp_path):
    file = write(tmp_path / "model.safetensors")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"x")
    assert f"has {size + 1} bytes and should have {size}" in refusal(tmp_path)


def test_what_is_no_safetensors_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    for content in (
        b"hello",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 9) + b'{"a": {}}',
    ):
        file.write_bytes(content)
        assert "cut short or no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_refused_with_the_command_that_fetches_the_file(tmp_path, name):
    tmp_path.joinpath(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    assert "git lfs pull" in refusal(tmp_path)


def test_a_file_of_pytorch_that_is_cut_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut short" in refusal(tmp_path)


def test_shards_that_are_missing_are_named(tmp_path):
    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    write(tmp_path / names[1])
    write_index(tmp_path, names)
    message = refusal(tmp_path)
    assert "3 are missing" in message and names[0] in message and names[1] not in message
    for name in names:
        write(tmp_path / name)
    assert check_weights(tmp_path) == [tmp_path / name for name in names]


def test_an_index_of_files_that_are_not_loaded_does_not_matter(tmp_path):
    # As vLLM does: Mistral's own file goes before the shards of the same model.
    write(tmp_path / "consolidated.safetensors")
    write_index(tmp_path, ["model-00001-of-00001.safetensors"])
    assert check_weights(tmp_path) == [tmp_path / "consolidated.safetensors"]


def test_an_index_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path / "model.safetensors")
    tmp_path.joinpath("model.safetensors.index.json").write_text('{"weight_m')
    assert "model.safetensors.index.json cannot be read" in refusal(tmp_path)


def test_memory_is_counted_in_the_data_type_of_the_model(tmp_path):
    wide = write(tmp_path / "wide.safetensors", "F32", 6)
    half = write(tmp_path / "half.safetensors", "BF16", 6, name="b")
    small = write(tmp_path / "small.safetensors", "I8", 6, name="c")
    assert weight_bytes([wide], 4) == 24
    assert weight_bytes([wide, half, small], 2) == 12 + 12 + 6
    assert weight_bytes([wide, half, small], 0.5) == 3 + 3 + 3
    assert weight_bytes([wide, half], 4, frozenset({"b"})) == 24
