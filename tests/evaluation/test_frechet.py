"""The Frechet distance against closed forms and SciPy in float64; statistics against one pass over everything."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from sora_jax.evaluation.frechet import (
    FeatureStatistics,
    Moments,
    frechet_distance,
    load_moments,
    load_pool,
    save_moments,
)


def random_features(seed, count=400, dim=24, mean=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) / 4 + mean * rng.normal(size=dim)


def scipy_distance(x, y):
    """Equation 3 as it is written, of two sets of features."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1 + c2 - 2 * root)


def random_covariance(seed, dim, rank):
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return factor @ factor.T


def test_one_dimension():
    first, second = (Moments(np.array([m]), np.array([[s**2]])) for m, s in ((1.0, 2.0), (-0.5, 0.25)))
    assert frechet_distance(first, second) == pytest.approx(1.5**2 + 1.75**2, rel=1e-12)


def test_commuting_covariances():
    """With axes in common the distance is that of the axes, each on its own."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    s1, s2 = rng.uniform(0.01, 3, 7), rng.uniform(0.01, 3, 7)
    first, second = (Moments(rng.normal(size=7), (axes * s**2) @ axes.T) for s in (s1, s2))
    expected = np.sum((first.mean - second.mean) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_two_dimensions_by_the_determinant():
    """Of 2 x 2 matrices Tr M^(1/2) = (Tr M + 2 (det M)^(1/2))^(1/2)."""
    c1, c2 = random_covariance(1, 2, 2), random_covariance(2, 2, 2)
    product = c1 @ c2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = frechet_distance(Moments(np.zeros(2), c1), Moments(np.zeros(2), c2))
    assert found == pytest.approx(np.trace(c1 + c2) - 2 * root, rel=1e-12)


def test_feature_sets_against_scipy():
    for seed in range(3):
        x, y = random_features(seed), random_features(seed + 10, count=300)
        first, second = (FeatureStatistics.of(z).moments() for z in (x, y))
        assert frechet_distance(first, second) == pytest.approx(scipy_distance(x, y), rel=1e-9)
        assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second), rel=1e-12)


def test_wide_float32_features_against_scipy():
    """As many features as a small network has, not negative and of very different sizes, as pooled ones are."""
    rng = np.random.default_rng(3)
    scales = np.exp(rng.normal(size=128) * 2)
    x, y = (np.maximum(rng.normal(size=(1000, 128)) + 0.2 * i, 0).astype(np.float32) * scales for i in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    expected = scipy_distance(x.astype(np.float64), y.astype(np.float64))
    found = frechet_distance(FeatureStatistics.of(x).moments(), FeatureStatistics.of(y).moments())
    assert found == pytest.approx(expected, rel=1e-6)


def test_singular_covariances():
    """Of subspaces that are orthogonal, of ones that meet, of a point, and of a set with itself."""
    zero = np.zeros(6)
    low = np.diag([1.0, 4.0, 0, 0, 0, 0])
    assert frechet_distance(Moments(zero, low), Moments(zero, np.diag([0, 0, 0, 9.0, 1.0, 0]))) == pytest.approx(15)
    assert frechet_distance(Moments(zero, low), Moments(zero, np.diag([4.0, 0, 0, 9.0, 0, 0]))) == pytest.approx(14)
    assert frechet_distance(Moments(zero, low), Moments(zero, np.zeros((6, 6)))) == pytest.approx(5)
    wide = random_covariance(4, 60, 20)
    assert 0 <= frechet_distance(Moments(np.zeros(60), wide), Moments(np.zeros(60), wide)) < 1e-11 * np.trace(wide)


@pytest.mark.parametrize("mean", [0.0, 1e6], ids=["centred", "far from zero"])
def test_splitting_changes_nothing(mean):
    rng = np.random.default_rng(5)
    x = random_features(6) + mean
    reference = random_features(7)
    whole = FeatureStatistics.of(x)
    target = FeatureStatistics.of(reference).moments()
    expected = scipy_distance(x, reference)
    np.testing.assert_allclose(whole.moments().covariance, np.cov(x, rowvar=False), rtol=1e-7)

    def check(statistics):
        assert statistics.count == len(x)
        scale = np.abs(whole.scatter).max()
        np.testing.assert_allclose(statistics.scatter, whole.scatter, rtol=0, atol=1e-9 * scale)
        np.testing.assert_allclose(statistics.mean, whole.mean, rtol=1e-12)
        assert frechet_distance(statistics.moments(), target) == pytest.approx(expected, rel=1e-6)

    for trial in range(3):
        order = rng.permutation(len(x))
        ends = np.sort(rng.choice(len(x), size=3 + 20 * trial))
        chunks = np.split(x[order], ends)  # some of them are of one sample, or of none
        stream = FeatureStatistics.empty(x.shape[1])
        for chunk in chunks:
            stream = stream.update(chunk)
        check(stream)
        parts = [FeatureStatistics.of(chunk) for chunk in chunks]
        while len(parts) > 1:  # a tree in any order, as hosts may merge
            first, second = (parts.pop(rng.integers(len(parts))) for _ in range(2))
            parts.append(first.merge(second))
        check(parts[0])
    one_by_one = FeatureStatistics.empty(x.shape[1])
    for row in x:
        one_by_one = one_by_one.update(row[None])
    check(one_by_one)


def test_too_few_samples():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        FeatureStatistics.of(np.ones((1, 4))).moments()
    with pytest.raises(ValueError, match="got 0"):
        FeatureStatistics.empty(4).moments()
    with pytest.warns(UserWarning, match="24 samples of 24 features: the covariance is singular"):
        FeatureStatistics.of(random_features(8, count=24)).moments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureStatistics.of(random_features(8, count=25)).moments()


def test_bad_values_are_named():
    good = Moments(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="first has 3 features and second 2"):
        frechet_distance(good, Moments(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match=r"second must be a mean \(D,\).*\(3,\), \(2, 2\)"):
        frechet_distance(good, Moments(np.zeros(3), np.eye(2)))
    with pytest.raises(ValueError, match="second must be finite"):
        frechet_distance(good, Moments(np.array([0, np.nan, 0]), np.eye(3)))
    with pytest.raises(ValueError, match="second must have a symmetric"):
        frechet_distance(good, Moments(np.zeros(3), np.triu(np.ones((3, 3)))))
    with pytest.raises(ValueError, match=r"second's covariance has the eigenvalue -0\.5"):
        frechet_distance(good, Moments(np.zeros(3), np.diag([1.0, -0.5, 2])))
    with pytest.raises(ValueError, match="those of row 2 are not"):
        FeatureStatistics.of(np.array([[0.0], [1], [np.inf]]))
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        FeatureStatistics.of(np.zeros(4))
    with pytest.raises(ValueError, match="of 3 and of 2 features do not merge"):
        FeatureStatistics.empty(3).merge(FeatureStatistics.empty(2))


def test_files(tmp_path):
    moments = {"": FeatureStatistics.of(random_features(9)).moments()}
    moments["_s"] = Moments(moments[""].mean[:5], moments[""].covariance[:5, :5])
    path = save_moments(tmp_path / "new" / "stats.npz", moments, "Inception")
    assert sorted(np.load(path).files) == ["features", "mu", "mu_s", "sigma", "sigma_s"]
    assert load_pool(path) is None
    pool = np.ones((2, 24), np.float32)
    np.testing.assert_array_equal(load_pool(save_moments(path, moments, "Inception", pool)), pool)
    loaded = load_moments(path, "Inception")
    assert loaded.keys() == moments.keys()
    for suffix, pair in moments.items():
        assert all((a == b).all() for a, b in zip(loaded[suffix], pair, strict=True))
    with pytest.raises(ValueError, match=r"stats\.npz.*of Inception features, not of EffNetLite0"):
        load_moments(path, "EffNetLite0")


def test_files_of_others(tmp_path):
    """pytorch-fid's have mu and sigma alone, maybe as float32; guided-diffusion's have the images beside them."""
    mean, covariance = np.arange(3.0), random_covariance(1, 3, 3).astype(np.float32)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (found,) = load_moments(tmp_path / "fid.npz", "Inception").values()
    assert found.covariance.dtype == np.float64
    np.testing.assert_array_equal(found.covariance, covariance)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npz.*no mu and sigma"):
        load_moments(tmp_path / "images.npz", "Inception")
    np.savez(tmp_path / "short.npz", mu=mean, sigma=covariance[:2])
    with pytest.raises(ValueError, match=r"short\.npz.*\(3,\), \(2, 3\)"):
        load_moments(tmp_path / "short.npz", "Inception")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}]), sigma=covariance)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "fid.npz").read_bytes()[:-40])
    (tmp_path / "text.npz").write_bytes(b"mu, sigma")
    np.save(tmp_path / "one.npy", mean)
    for name in ("pickle.npz", "cut.npz", "text.npz", "one.npy"):
        with pytest.raises(ValueError, match=name):
            load_moments(tmp_path / name, "Inception")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_moments(tmp_path / "none.npz", "Inception")
