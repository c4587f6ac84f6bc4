"""Two processes that train together learn what one does of the same samples: losses, weights and running moments."""

import torch
from processes import in_processes
from test_objective import objective_of
from tiny import prompt, text
from torch.nn.parallel import DistributedDataParallel

# of each step the rows of both processes: images of one number of tokens each, and in the last step one without
STEPS = [[(2, 3, 0), (3, 2, 1)], [(2, 3, 2), (2, 3, 3)], [(3, 2, 4), None]]


def row(image, seed):
    """Three tokens, an image, some labels; of text alone where there is no image."""
    inputs = prompt([*text(3, seed), *([image] if image else text(6, seed + 1)), *text(5, seed + 2)])
    inputs["targets"] = torch.cat([inputs["input_ids"][:, 1:], torch.full((1, 1), -100)], 1)
    inputs["targets"][:, :8] = -100
    return inputs


def joined(rows):
    return {name: torch.cat([one[name] for one in rows if name in one]) for name in rows[0]}


def learner():
    torch.manual_seed(0)
    return objective_of(center=True, standardize=True).train()


def learn(objective, model, rows_of_step, num_processes):
    """Steps of plain descent: their losses, and the weights before the last one."""
    found, weights = [], {}
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for number, images in enumerate(STEPS):
        rows = [row(image, 3 * number + n) for n, image in enumerate(images)]
        num_labels = sum(int((one["targets"] != -100).sum()) for one in rows)
        weights = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
        losses = model(**rows_of_step(rows), num_items_in_batch=num_labels / num_processes)
        losses["loss"].backward()
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
        found.append({name: losses[name].detach() for name in ("lm_loss", "distill_loss") if name in losses})
    return found, weights


def learn_as(rank, folder):
    objective = learner()
    model = DistributedDataParallel(objective, find_unused_parameters=True)
    learned = learn(objective, model, lambda rows: rows[rank], 2)
    torch.save((*learned, objective.state_dict()), folder / f"{rank}.pt")


def test_two_processes_learn_what_one_does(tmp_path):
    in_processes(2, tmp_path, learn_as, tmp_path)
    (first, weights, state), (second, _, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    objective = learner()
    start = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    expected, their_weights = learn(objective, objective, joined, 1)
    torch.testing.assert_close(weights, their_weights)
    for one, two, both in zip(first[:2], second[:2], expected):
        assert both.keys() == {"lm_loss", "distill_loss"}
        for name in both:
            torch.testing.assert_close((one[name] + two[name]) / 2, both[name])
    assert objective.distillation.num_updates == state["distillation.num_updates"] == 3
    moments = [name for name in state if "distillation.mean" in name or "distillation.variance" in name]
    assert len(moments) == 6
    for name in moments:
        torch.testing.assert_close(state[name], objective.state_dict()[name])
        assert torch.equal(state[name], other[name]) and not torch.equal(state[name], start[name])
