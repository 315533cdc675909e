"""Package of mmdet3d-quant; installs into an existing mmdet3d environment."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict = {}
exec((ROOT / 'mmdet3d_quant' / 'version.py').read_text(), VERSION)

setup(
    name='mmdet3d-quant',
    version=VERSION['__version__'],
    description='INT8 quantization of MMDetection3D models as a config change',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmdet3d_quant*']),
    package_data={'mmdet3d_quant.report': ['page.html', 'ranges.html']},
    # torch and mmcv are not listed: they must fit the CUDA version and are there already.
    install_requires=[
        'mmengine>=0.10,<0.11',
        'mmdet>=3.2,<3.4',
        'mmdet3d>=1.4,<1.5',
        'pytorch-quantization>=2.1.3,<2.2',
        'numpy<2',
        'rich>=12',
        'jinja2>=3',
        'matplotlib',
    ],
    extras_require={
        'export': ['onnx>=1.14', 'onnxruntime>=1.16', 'openvino>=2024.0'],
        'dev': ['pytest>=8', 'ruff', 'mypy'],
    },
)
