"""CPUs and memory of a rank follow from the speeds; ranks and pods from the GPUs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sizing import LOADERS_MAX, SHM_GIB, RankSize, Shape, cpu_shape, gpu_shape, rank_size
from medtl_dist.errors import UserError


def test_a_known_case() -> None:
    # 1,200 × 4/3 = 1,600 images/s from cores of 1,500: 2 loaders, a core for the rank; 6 + 2 × 0.25 + 4 × 8 × 3 × 224² B.
    assert rank_size(batch_images=8, image_size_px=224) == RankSize(cpus=3, loaders=2, memory_gib=7)
    # 4 × 512 × 3 × 1024² B = 6 GiB beside 6.5.
    assert rank_size(batch_images=512, image_size_px=1024).memory_gib == 13
    shape = gpu_shape(gpus=8, gpus_per_worker=4, min_gpus=4, global_batch_size=64, image_size_px=224)
    assert (shape.pods, shape.min_pods, shape.ranks, shape.elastic) == (2, 1, 8, True)
    amounts = {"cpu": "12", "memory": f"{4 * 7 + SHM_GIB}Gi", "nvidia.com/gpu": "4"}
    assert shape.worker.as_tree() == {"limits": amounts, "requests": amounts}
    assert cpu_shape(workers=3, cpus_per_worker=2) == Shape(3, 1, RankSize(2, 0, 4), gpu=False, min_pods=3)


@settings(max_examples=50, deadline=None)
@given(core=st.floats(10, 1e5), gpu=st.floats(1, 1e5), batch=st.integers(1, 4096), size=st.integers(16, 1024))
def test_loaders_keep_up_and_not_by_far(core: float, gpu: float, batch: int, size: int) -> None:
    try:
        rank = rank_size(loader_images_per_s_core=core, gpu_images_per_s=gpu, batch_images=batch, image_size_px=size)
    except UserError:
        assert gpu * 4 / 3 > LOADERS_MAX * core * 0.999
        return
    assert rank.loaders * core >= gpu * 4 / 3 * 0.999
    assert rank.cpus == rank.loaders + 1
    assert (rank.loaders - 1) * core < gpu * 4 / 3
    assert rank.memory_gib * 2**30 >= 4 * batch * 3 * size**2


@pytest.mark.parametrize("speed", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["loader_images_per_s_core", "gpu_images_per_s"])
def test_a_speed_that_is_none_is_refused(name: str, speed: float) -> None:
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*expected a positive number"):
        rank_size(batch_images=1, image_size_px=1, **{name: speed})


@pytest.mark.parametrize(("gpus", "each", "least"), [(8, 3, None), (4, 8, None), (8, 4, 2), (8, 1, 9), (8, 4, 12)])
def test_gpus_that_do_not_divide_into_pods_are_refused(gpus: int, each: int, least: int | None) -> None:
    with pytest.raises(UserError, match="expected multiples of --gpus-per-worker"):
        gpu_shape(gpus=gpus, gpus_per_worker=each, min_gpus=least, global_batch_size=64, image_size_px=224)
