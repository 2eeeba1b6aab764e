import numpy as np
import pytest
import torch

from medvision.mixing import mix


def batch(images=5, size=(16, 24)):
    """Each image has its own number everywhere."""
    return torch.arange(images, dtype=torch.float32)[:, None, None, None].expand(images, 2, *size).clone()


def test_mixup_blends_every_image_with_another_in_the_same_shares():
    torch.manual_seed(0)
    mixed, order, share = mix(batch(), mixup=0.4, cutmix=0)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4] and 0.5 <= share <= 1
    expected = share * torch.arange(5.0) + (1 - share) * order
    torch.testing.assert_close(mixed, expected[:, None, None, None].expand_as(mixed))


def test_cutmix_covers_a_box_whose_share_is_told():
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, order, share = mix(batch(), mixup=0, cutmix=1)
        own = mixed == batch()
        for n in range(5):
            if order[n] != n:
                assert float(own[n].float().mean()) == pytest.approx(share)
                assert (mixed[n][~own[n]] == order[n]).all()
                rows, columns = (~own[n, 0]).any(1), (~own[n, 0]).any(0)
                assert int((~own[n, 0]).sum()) == int(rows.sum()) * int(columns.sum())  # one box
        assert 0.45 < share <= 1


def test_shares_are_those_of_the_beta_distribution_folded():
    torch.manual_seed(1)
    found = [mix(batch(2, (1, 1)), mixup=0.4, cutmix=0)[2] for _ in range(2000)]
    drawn = np.random.default_rng(0).beta(0.4, 0.4, 20000)
    expected = np.maximum(drawn, 1 - drawn)
    np.testing.assert_allclose(
        np.quantile(found, [0.25, 0.5, 0.75]), np.quantile(expected, [0.25, 0.5, 0.75]), atol=0.03
    )


def test_with_both_it_is_one_or_the_other():
    boxes = 0
    for seed in range(100):
        torch.manual_seed(seed)
        mixed, order, share = mix(batch(3), mixup=1, cutmix=1)
        n = next((n for n in range(3) if order[n] != n), None)
        if n is not None and share < 0.99:
            boxes += bool(((mixed[n] == n) | (mixed[n] == order[n])).all())
    assert 20 < boxes < 70


def test_the_generator_decides_all():
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(mix(torch.arange(96.0).view(3, 2, 4, 4), 0.5, 0.5))
    assert torch.equal(results[0][0], results[1][0]) and results[0][2] == results[1][2]
