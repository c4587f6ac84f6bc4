"""Patches to image tokens."""

import pytest
import torch
from tiny import GRID, PATCH, InFourBits, image, tiny_llm, tiny_vora

from vora import VoraConfig
from vora.build.vit_init import VitEmbedding
from vora.model.patch_embed import PatchEmbedding, merge_neighbours


def config(**changes):
    sizes = {"patch_size": PATCH, "image_size": PATCH * GRID, "vision_hidden_size": 16}
    return VoraConfig(tiny_llm("llama").config, **sizes | changes)


@pytest.fixture
def embedding():
    torch.manual_seed(0)
    embedding = PatchEmbedding(config())
    torch.nn.init.normal_(embedding.position)
    return embedding


def test_weights_in_integers_make_no_integers_of_the_pixels(embedding):
    inputs = image(2, 3), torch.tensor([[1, 2, 3]])
    expected = embedding(*inputs)
    embedding.patch = InFourBits(embedding.patch)
    assert torch.equal(embedding(*inputs), expected)


def test_an_image_embeds_alike_in_any_company(embedding):
    shapes = [(2, 5), (GRID, GRID), (5, 2), (1, 7)]
    patches = [image(*shape, seed) for seed, shape in enumerate(shapes)]
    grids = torch.tensor([(1, *shape) for shape in shapes])
    together = embedding(torch.cat(patches), grids).split([len(p) for p in patches])
    for found, alone, grid in zip(together, patches, grids):
        torch.testing.assert_close(found, embedding(alone, grid[None]))


@pytest.mark.parametrize("axis", [0, 1])
def test_positions_are_resampled_along_each_axis(embedding, axis):
    ramp = torch.arange(float(GRID)).view((GRID, 1) if axis == 0 else (1, GRID)).expand(GRID, GRID)
    embedding.position.data = ramp.reshape(-1, 1).repeat(1, 16)
    table = embedding.positions([(1, 2, 6)]).view(2, 6, 16)[..., 0]
    table = table if axis == 0 else table.T
    torch.testing.assert_close(table, table[:, :1].expand_as(table), atol=1e-5, rtol=0)  # constant across
    assert (table[:, 0].diff() > 0).all()  # ascending along
    lines = embedding.positions([(1, 7, 1), (1, 1, 7)][axis : axis + 1])  # torch 2.13 alone would make all alike
    assert len(lines.unique(dim=0)) == 7


def test_positions_learn_from_every_grid_and_frames_share_them(embedding):
    assert embedding.positions_of_grid(GRID, GRID) is embedding.position
    found = embedding.positions([(2, 2, 2)])
    assert found.shape == (8, 16) and torch.equal(found[:4], found[4:])
    embedding(image(2, 5), torch.tensor([[1, 2, 5]])).sum().backward()
    assert (embedding.position.grad.abs().sum(1) > 0).all()


def test_axial_positions_are_a_row_and_a_column_whatever_the_grid():
    embedding = PatchEmbedding(config(axial_positions=True))
    torch.nn.init.normal_(embedding.position)
    rows, columns = embedding.position.view(2, GRID, 16)
    found = embedding.positions_of_grid(2, GRID + 2).view(2, GRID + 2, 16)
    for row, column in ((0, 0), (1, 0), (1, GRID - 1)):
        assert torch.equal(found[row, column], rows[row] + columns[column])
    assert torch.equal(found[:, GRID:], found[:, GRID - 1 : GRID].expand(2, 2, 16))  # past the last
    embedding(image(2, 1), torch.tensor([[1, 2, 1]])).sum().backward()
    learned = embedding.position.grad.abs().sum(1).view(2, GRID) > 0
    assert learned.tolist() == [[i < num for i in range(GRID)] for num in (2, 1)]


def test_axial_positions_begin_as_near_to_the_teachers_as_sums_can():
    torch.manual_seed(0)
    embedding = PatchEmbedding(config(axial_positions=True))
    sums = torch.randn(GRID, 1, 16) + torch.randn(1, GRID, 16)
    parts = {"bias": None, "norm": None, "patch_size": PATCH, "num_channels": 3, "image_size": PATCH * GRID}
    for table in (sums, torch.randn(GRID, GRID, 16)):
        VitEmbedding(torch.zeros(16, 3 * PATCH**2), position=table.flatten(0, 1), **parts).copy_to(embedding)
        left = table - embedding.positions_of_grid(GRID, GRID).detach().view(GRID, GRID, 16)
        # of least squares: nothing is left that a row or a column could still take
        assert left.mean(0).abs().max() < 1e-5 and left.mean(1).abs().max() < 1e-5
        assert table is not sums or left.abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_fresh_image_tokens_are_as_large_as_words(family):
    vora = tiny_vora(family)
    words = vora.get_input_embeddings()(torch.arange(128)).std()
    tokens = vora.model.patch_embedding(image(9, 9), torch.tensor([[1, 9, 9]])).std()
    assert 0.5 < tokens / words < 2


def test_configurations_that_cannot_work_are_refused():
    for changes, message in (
        ({"image_size": 3}, "image_size 3 holds no patch of 4"),
        ({"image_token_id": -1}, "image_token_id -1 lies outside the vocabulary of 128"),
        ({"image_token_id": 128}, "image_token_id 128 lies outside the vocabulary of 128"),
        ({"image_attention": "both"}, "image_attention 'both' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)


def test_neighbours_of_a_square_become_one_token():
    patches = torch.arange(24.0).view(24, 1)  # a 2 x 4 image, then two frames of 4 x 2
    found = merge_neighbours(patches, [(1, 2, 4), (2, 4, 2)], 2)[..., 0]
    assert found.tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23],
    ]  # fmt: skip
    assert torch.equal(merge_neighbours(patches, [(1, 4, 6)], 1)[:, 0], patches)
    with pytest.raises(ValueError, match="1 of 2 images have grids, such as 3 x 2 patches"):
        merge_neighbours(patches[:10], [(1, 2, 2), (1, 3, 2)], 2)
    torch.manual_seed(0)
    merging, patches = PatchEmbedding(config(patch_merge=2)), image(2, 4)
    features = merging.norm(merging.patch(patches)) + merging.positions([(1, 2, 4)])
    expected = torch.stack([features[[0, 1, 4, 5]].flatten(), features[[2, 3, 6, 7]].flatten()])
    torch.testing.assert_close(merging(patches, torch.tensor([[1, 2, 4]])), merging.projection(expected))
