"""Package of mmdet3d-quant; installs into an existing mmdet3d environment."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION: dict = {}
exec((ROOT / 'mmdet3d_quant' / 'version.py').read_text(), VERSION)
#: What a wheel carries in `.mim`, where OpenMMLab's `mim run` and `mmdet3d-quant` look.
CARRIED = (
    'model-index.yml',
    'tools/*.py',
    'configs/**/*.py',
    'configs/**/metafile.yml',
    'checkpoints/bevfusion_tiny_lidar-cam_synthetic.pth',
)


class BuildWithTools(build_py):
    """Puts tools, configs and the demo's weights into the package."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            return  # the checkout has them
        shutil.rmtree(Path(self.build_lib, 'mmdet3d_quant/.mim'), ignore_errors=True)
        for pattern in CARRIED:
            for source in ROOT.glob(pattern):
                target = Path(self.build_lib, 'mmdet3d_quant/.mim', source.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(
    name='mmdet3d-quant',
    version=VERSION['__version__'],
    description='INT8 quantization of MMDetection3D models as a config change',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='quantization INT8 PTQ QAT mmdet3d BEVFusion LiDAR TensorRT OpenVINO ONNX',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Operating System :: POSIX :: Linux',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(8, 13)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.8',
    packages=find_packages(include=['mmdet3d_quant*']),
    package_data={
        'mmdet3d_quant': ['py.typed'],
        'mmdet3d_quant.report': ['*.html'],
    },
    py_modules=['mmdet3d_quant_cli'],
    cmdclass={'build_py': BuildWithTools},
    entry_points={'console_scripts': ['mmdet3d-quant = mmdet3d_quant_cli:main']},
    # torch and mmcv are not listed: they must fit the CUDA version and are there already.
    install_requires=[
        'mmengine>=0.10,<0.11',
        'mmdet>=3.2,<3.4',
        'mmdet3d>=1.4,<1.5',
        'pytorch-quantization>=2.1.3,<2.2',
        'numpy<2',  # as nuscenes-devkit, which mmdet3d brings
        'rich>=12',
        'jinja2>=3',
        'matplotlib',
        'numba',
        'nuscenes-devkit',
        'pillow',
        'pyquaternion',
        'scipy',
    ],
    extras_require={
        'export': ['onnx>=1.14', 'onnxruntime>=1.16', 'openvino>=2024.0', 'psutil'],
        'compiler': [
            'tensorrt-rtx-cu12-libs==1.7.1.116',
            'tensorrt-rtx-cu12-bindings==1.7.1.116',
        ],
        'safetensors': ['safetensors'],
        'dev': ['pytest>=8', 'pytest-xdist>=3', 'hypothesis', 'ruff', 'mypy', 'safetensors'],
    },
)
