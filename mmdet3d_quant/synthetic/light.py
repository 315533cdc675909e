"""Light and weather of a block: from glaring sun to a night with a few lamps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdet3d_quant.synthetic.sensors import CAMERAS, Pose
from mmdet3d_quant.synthetic.solid import GLOWS

#: Share of day, dusk and night.
HOURS = {'day': 0.5, 'dusk': 0.22, 'night': 0.28}


@dataclass
class Light:
    """Light and weather of a block, in linear units: white in full daylight is about 1.

    Attributes:
        hour: ``day``, ``dusk`` or ``night``.
        sun: Direction to the sun, (3,), in the block's frame.
        direct: Red, green, blue of the sun's light, (3,).
        ambient: Of the sky's light, (3,).
        sky: Colour of the sky at the horizon and at the top, (2, 3).
        haze: Distance in metres over which contrast falls to a third.
        head: Strength of the ego car's head lamps.
        glow: Light of each kind of lamp in ``GLOWS``, (G, 3).
        exposure: Gain of each camera, (6,).
        glare: Strength of the sun's bloom in cameras that see it.
        noise: Standard deviation of the sensor noise in grey levels.
        rain: 0 (dry) to 1.
    """

    hour: str
    sun: np.ndarray
    direct: np.ndarray
    ambient: np.ndarray
    sky: np.ndarray
    haze: float
    head: float
    glow: np.ndarray
    exposure: np.ndarray
    glare: float
    noise: float
    rain: float

    def on(self, points: np.ndarray, lamps: np.ndarray, ego: Pose) -> np.ndarray:
        """Computes the light of lamps at points on or near the ground.

        Args:
            points: (N, 2), metres, in the block's frame.
            lamps: Positions of street lamps, (L, 2).
            ego: Pose of the ego car.

        Returns:
            Strength, (N,).
        """
        light = np.zeros(len(points))
        if self.head == 0:
            return light
        c, s = math.cos(ego.yaw), math.sin(ego.yaw)
        dx, dy = points[:, 0] - ego.x, points[:, 1] - ego.y
        ahead, left = c * dx + s * dy, -s * dx + c * dy
        beam = np.exp(-((np.arctan2(left, np.maximum(ahead, 0.1)) / 0.45) ** 2))
        light += self.head * beam * (ahead > 1) / (1 + (ahead / 12) ** 2)
        for x, y in lamps:
            light += 0.12 * np.exp(-((points[:, 0] - x) ** 2 + (points[:, 1] - y) ** 2) / 60)
        return light


def make_light(rng: np.random.Generator, hours: Sequence[str] = tuple(HOURS)) -> Light:
    """Draws light and weather.

    Args:
        rng: Source of everything random.
        hours: Those of ``HOURS`` to draw from, in proportion to their shares.
    """
    shares = np.array([HOURS[hour] for hour in hours])
    hour = str(rng.choice(list(hours), p=shares / shares.sum()))
    azimuth = rng.uniform(-math.pi, math.pi)
    low, high = {'day': (0.25, 1.2), 'dusk': (0.03, 0.2), 'night': (0.5, 1.0)}[hour]
    elevation = rng.uniform(low, high)
    sun = np.array([math.cos(azimuth) * math.cos(elevation)] * 3)
    sun[1], sun[2] = math.sin(azimuth) * math.cos(elevation), math.sin(elevation)
    cloudy = rng.random() < 0.35
    rain = float(rng.uniform(0.1, 1)) if rng.random() < 0.15 else 0.0
    if hour == 'day':
        direct = np.array([1, 0.95, 0.86]) * rng.uniform(0.6, 1.1) * (0.12 if cloudy else 1)
        ambient = np.array([0.4, 0.44, 0.5]) * rng.uniform(0.7, 1.2)
        sky = np.array([[0.85, 0.9, 0.95], [0.4, 0.58, 0.9]]) * rng.uniform(0.6, 1.3)
    elif hour == 'dusk':
        direct = np.array([0.7, 0.38, 0.16]) * rng.uniform(0.2, 0.8)
        ambient = np.array([0.16, 0.16, 0.22]) * rng.uniform(0.6, 1.3)
        sky = np.array([[0.8, 0.42, 0.22], [0.14, 0.18, 0.34]]) * rng.uniform(0.5, 1)
    else:
        direct = np.zeros(3)
        ambient = np.array([0.05, 0.05, 0.065]) * rng.uniform(0.5, 1.6)
        sky = np.array([[0.05, 0.045, 0.05], [0.008, 0.01, 0.02]]) * rng.uniform(0.4, 1.5)
    if cloudy or rain:
        sky[:] = 0.75 * sky.mean() * np.array([1, 1.02, 1.06])
    dark = hour != 'day'
    glow = np.zeros((len(GLOWS), 3))
    if dark:
        glow[GLOWS['head lamp']] = np.array([3.0, 2.8, 2.2]) * rng.uniform(0.5, 1)
        glow[GLOWS['tail lamp']] = np.array([1.1, 0.06, 0.04])
        glow[GLOWS['lamp']] = np.array([4.0, 3.2, 2.0])
        glow[GLOWS['beacon']] = np.array([2.0, 0.9, 0.05])
        if rng.random() < 0.6:
            glow[GLOWS['window']] = np.array([0.5, 0.42, 0.26]) * rng.uniform(0.2, 1.2)
    level = (direct * 0.5 + ambient).mean() + 0.06 * dark
    gain = (0.6 if hour == 'day' else 0.6 if hour == 'dusk' else 0.38) / level
    return Light(
        hour=hour,
        sun=sun,
        direct=direct * (0.1 if rain else 1),
        ambient=ambient,
        sky=sky,
        haze=float(rng.choice([400, 200, 80], p=[0.6, 0.25, 0.15]) * (0.6 if rain else 1)),
        head=float(rng.uniform(0.15, 0.45)) if dark else 0.0,
        glow=glow,
        exposure=gain * np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.25, len(CAMERAS))),
        glare=float(rng.uniform(0.4, 1.5)) if not (cloudy or rain or hour == 'night') else 0.0,
        noise=float(rng.uniform(1.5, 4) * (2.2 if hour == 'night' else 1)),
        rain=rain,
    )
