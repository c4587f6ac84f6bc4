"""Any samples, packed: each once and whole, none above the length, and no token sees another sample's."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import sample
from tiny import IMAGE, tiny_vora

from vora.data.packing import collate_sequences, next_sequence, places, share_prefixes, side_by_side
from vora.model.attention import attention_masks

CONFIG = tiny_vora("llama").config.get_text_config()
SIDES = st.tuples(st.integers(1, 3), st.integers(1, 3))
WORDS = st.lists(st.sampled_from([11, 12, 13]), min_size=1, max_size=6)  # few, so that conversations often begin alike
# images before and between the words that all begin with, then (words of one conversation, answer)
GROUPS = st.tuples(
    st.lists(SIDES, max_size=2), WORDS, st.lists(st.tuples(WORDS, st.integers(1, 3)), min_size=1, max_size=3)
)


def conversations(images, beginning, rest, seed):
    """Of one group, as `VoraProcessor.training_sample` makes them."""
    shown = [part for number, side in enumerate(images) for part in ((*side, 10 * seed + number), *beginning)]
    return [sample(*beginning, *shown, *words, *(14,) * answer, answer=answer) for words, answer in rest]


@given(st.lists(st.tuples(GROUPS, st.booleans()), min_size=1, max_size=6), st.integers(0, 30))
@settings(max_examples=40)
def test_each_sample_is_packed_once_and_whole_and_sees_itself_alone(groups, room):
    told = [conversations(*group, seed) for seed, (group, _) in enumerate(groups)]
    shared = [
        side_by_side([share_prefixes([one]) for one in each]) if is_apart else share_prefixes(each)
        for each, (_, is_apart) in zip(told, groups)
    ]
    length, left, rows = max(len(one["input_ids"]) for one in shared) + room, [*range(len(shared))], []
    while left:
        rows.append([left[i] for i in next_sequence([len(shared[i]["input_ids"]) for i in left], length)])
        left = [number for number in left if number not in rows[-1]]
    assert sorted(sum(rows, [])) == list(range(len(shared)))
    assert all(sum(len(shared[number]["input_ids"]) for number in row) <= length for row in rows)

    batch = collate_sequences([[shared[number] for number in row] for row in rows], length, pad_token_id=0)
    order = [shared[number] for row in rows for number in row if "pixel_values" in shared[number]]
    if order:
        for name in ("pixel_values", "image_grid_thw"):
            assert np.array_equal(batch[name], np.concatenate([one[name] for one in order]))
    numbers = places(batch, IMAGE).get("image_numbers", torch.full(batch["input_ids"].shape, -1))
    assert torch.equal(numbers >= 0, batch["input_ids"] == IMAGE)

    blocks = numbers if order else None
    given = CONFIG, torch.zeros(*batch["input_ids"].shape, 8), None, None, batch["position_ids"], blocks
    seen = attention_masks(*given, batch["seen_until"]).expand(len(rows), 1, length, length)[:, 0].numpy()
    for number, row in enumerate(rows):
        start, owner = 0, np.arange(-length, 0)  # padding is nobody's but its own
        for index in row:
            end = start + len(shared[index]["input_ids"])
            owner[start:end] = index
            for one, last in zip(told[index], shared[index]["ends"] + start):
                wanted = np.append(one["labels"][1:], -100)
                size = np.flatnonzero(wanted != -100).max() + 1
                path = np.flatnonzero(seen[number, last])  # all that its last token sees is this conversation
                assert batch["input_ids"][number, path].tolist() == one["input_ids"][:size].tolist()
                assert batch["targets"][number, path].tolist() == wanted[:size].tolist()
                assert batch["position_ids"][number, path].tolist() == list(range(size))
            start = end
        assert not (seen[number] & (owner[:, None] != owner)).any()
    num_labels = sum(int((one["labels"][1:] != -100).sum()) for each in told for one in each)
    assert int((batch["targets"] != -100).sum()) == num_labels
    assert int(batch["num_samples"]) == sum(map(len, told))
