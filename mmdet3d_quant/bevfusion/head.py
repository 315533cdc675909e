"""TransFusion head: one box per peak of a class heatmap, refined by attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead
from mmdet3d.registry import MODELS, TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet3d_quant.bevfusion.losses import HeadLosses, Outputs
from mmdet3d_quant.bevfusion.nms import heatmap_peaks, kept_by_circle_nms
from mmdet3d_quant.core.compat import strict_zip

_CONV = dict(type='Conv1d')
_NORM = dict(type='BN1d')

#: Outputs that exist once, not once per decoder layer.
_SHARED = ('query_heatmap_score', 'query_labels', 'dense_heatmap')
#: Outputs that the box coder reads, beside the score and the optional velocity.
_CODED = ('center', 'height', 'dim', 'rot')


class TransFusionHead(HeadLosses):
    """TransFusion head.

    Args:
        num_proposals: Boxes per sample, P.
        auxiliary: Whether :meth:`forward` returns all decoder layers, or only the last.
        in_channels: Channels of the map.
        hidden_channel: Channels inside the head.
        num_classes: Number of classes.
        num_decoder_layers: Number of decoder layers.
        decoder_layer: Config of a decoder layer.
        num_heads: Kept; the decoder layer's config decides.
        nms_kernel_size: Side of the window in which a peak is the maximum, cells, odd.
        bn_momentum: Momentum of all batch norms.
        common_heads: Per regressed quantity its channels and number of convolutions.
        num_heatmap_convs: Convolutions of the class scores.
        conv_cfg: Convolution type of the prediction heads.
        norm_cfg: Norm type of the prediction heads.
        bias: Bias of the convolutions, as mmcv takes it.
        loss_cls: Config of the loss of the class scores; must use a sigmoid.
        loss_bbox: Config of the loss of the regressed quantities.
        loss_heatmap: Config of the loss of the heatmap.
        train_cfg: Needed to train: ``assigner``, ``pos_weight``, ``code_weights``,
            ``gaussian_overlap``, ``min_radius``, ``grid_size``, ``point_cloud_range``,
            ``voxel_size``, ``out_size_factor``.
        test_cfg: ``dataset``, ``grid_size``, ``out_size_factor`` and ``nms_type`` (None or
            ``'circle'``).
        bbox_coder: Config of the box coder.
        sync_avg_factor: Normalise losses by the objects of all processes, so that several train
            like one with all their samples; by default each by its own, as published.

    Raises:
        ValueError: If an argument is one the head cannot honour.
    """

    def __init__(
        self,
        num_proposals: int = 128,
        auxiliary: bool = True,
        in_channels: int = 128 * 3,
        hidden_channel: int = 128,
        num_classes: int = 4,
        num_decoder_layers: int = 3,
        decoder_layer: dict | None = None,
        num_heads: int = 8,
        nms_kernel_size: int = 1,
        bn_momentum: float = 0.1,
        common_heads: dict | None = None,
        num_heatmap_convs: int = 2,
        conv_cfg: dict = _CONV,
        norm_cfg: dict = _NORM,
        bias: bool | str = 'auto',
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_heatmap: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        bbox_coder: dict | None = None,
        sync_avg_factor: bool = False,
    ) -> None:
        super().__init__()
        self.sync_avg_factor = sync_avg_factor
        if test_cfg is None or bbox_coder is None or decoder_layer is None:
            raise ValueError('TransFusionHead needs decoder_layer, test_cfg and bbox_coder')
        if test_cfg.get('nms_type') not in (None, 'circle'):
            raise ValueError(
                f"test_cfg.nms_type must be None or 'circle', got {test_cfg['nms_type']!r}"
            )
        if loss_cls is not None and not loss_cls.get('use_sigmoid', False):
            raise ValueError('TransFusionHead scores by a sigmoid: loss_cls needs use_sigmoid')
        self.num_classes = num_classes
        self.num_proposals = num_proposals
        self.auxiliary = auxiliary
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.num_decoder_layers = num_decoder_layers
        self.nms_kernel_size = nms_kernel_size
        self.bn_momentum = bn_momentum
        self.train_cfg = train_cfg
        self.test_cfg = test_cfg
        self.losses = {
            name: MODELS.build(cfg)
            for name, cfg in (('cls', loss_cls), ('bbox', loss_bbox), ('heatmap', loss_heatmap))
            if cfg is not None
        }
        self.bbox_assigner = None if train_cfg is None else TASK_UTILS.build(train_cfg['assigner'])
        self.bbox_coder = TASK_UTILS.build(bbox_coder)

        conv2d = dict(type='Conv2d')
        same = dict(kernel_size=3, padding=1, bias=bias)
        self.shared_conv = build_conv_layer(conv2d, in_channels, hidden_channel, **same)
        self.heatmap_head = nn.Sequential(
            ConvModule(
                hidden_channel,
                hidden_channel,
                conv_cfg=conv2d,
                norm_cfg=dict(type='BN2d'),
                **same,
            ),
            build_conv_layer(conv2d, hidden_channel, num_classes, **same),
        )
        self.class_encoding = nn.Conv1d(num_classes, hidden_channel, 1)
        self.decoder = nn.ModuleList(
            MODELS.build(copy.deepcopy(decoder_layer))  # mmdet's layer writes into its config
            for _ in range(num_decoder_layers)
        )
        heads = dict(common_heads or {}, heatmap=(num_classes, num_heatmap_convs))
        self.prediction_heads = nn.ModuleList(
            SeparateHead(hidden_channel, heads, conv_cfg=conv_cfg, norm_cfg=norm_cfg, bias=bias)
            for _ in range(num_decoder_layers)
        )
        x, y = (side // test_cfg['out_size_factor'] for side in test_cfg['grid_size'][:2])
        self.register_buffer('bev_pos', self.create_2D_grid(x, y), persistent=False)
        self.init_weights()

    @staticmethod
    def create_2D_grid(x_size: int, y_size: int) -> Tensor:
        """Lists the centres of all cells, (1, x_size * y_size, 2), x then y in cells, y fastest."""
        x = torch.arange(x_size, dtype=torch.float) + 0.5
        y = torch.arange(y_size, dtype=torch.float) + 0.5
        return torch.cartesian_prod(x, y)[None]

    def init_weights(self) -> None:
        """Initialises the decoder's matrices and the momentum of the batch norms."""
        for parameter in self.decoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = self.bn_momentum

    def forward_single(self, inputs: Tensor, metas: Any = None) -> list[dict[str, Tensor]]:
        """Predicts from one map.

        Args:
            inputs: (B, in_channels, X, Y).
            metas: Not used.

        Returns:
            A list of one dict: per regressed quantity and ``heatmap`` (class logits)
            (B, channels, P * layers), ``query_heatmap_score`` (B, classes, P),
            ``query_labels`` (B, P) and ``dense_heatmap`` (B, classes, X, Y).
        """
        bev = self.shared_conv(inputs)
        flat = bev.flatten(2)
        positions = self.bev_pos.expand(bev.shape[0], -1, -1)  # not len(): exporters freeze it
        if positions.shape[1] != flat.shape[2]:
            raise ValueError(
                f'TransFusionHead expects a map of {positions.shape[1]} cells (test_cfg '
                f'grid_size and out_size_factor), got {tuple(inputs.shape[2:])}'
            )
        with torch.autocast(bev.device.type, enabled=False):
            dense_heatmap = self.heatmap_head(bev.float())
        peaks, top = self.propose(dense_heatmap.detach().sigmoid())
        labels, cells = top // peaks.shape[2], top % peaks.shape[2]

        def at_cells(x: Tensor) -> Tensor:
            return x.gather(2, cells[:, None].expand(-1, x.shape[1], -1))

        one_hot = F.one_hot(labels, self.num_classes).transpose(1, 2)
        query = at_cells(flat) + self.class_encoding(one_hot.float())
        query_pos = at_cells(positions.transpose(1, 2)).transpose(1, 2)

        layers = []
        for decoder, head in strict_zip(self.decoder, self.prediction_heads):
            query = decoder(query, key=flat, query_pos=query_pos, key_pos=positions)
            outputs = head(query)
            outputs['center'] = outputs['center'] + query_pos.transpose(1, 2)
            query_pos = outputs['center'].detach().transpose(1, 2)
            layers.append(outputs)

        shared = (at_cells(peaks), labels, dense_heatmap)
        if not self.auxiliary:
            layers = layers[-1:]
        merged = {key: torch.cat([layer[key] for layer in layers], dim=-1) for key in layers[0]}
        return [{**merged, **dict(strict_zip(_SHARED, shared))}]

    def propose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses the queries, the highest peaks of the scores (B, classes, X, Y) of all cells.

        Returns:
            Scores of the peaks (B, classes, X * Y), 0 elsewhere; and which of them are queries,
            int64 (B, P), counted over classes and cells, highest first.
        """
        dataset = self.test_cfg['dataset']
        peaks = heatmap_peaks(scores, self.num_classes, self.nms_kernel_size, dataset)
        return peaks, peaks.flatten(1).topk(self.num_proposals, dim=1).indices

    def forward(self, feats: Tensor | Sequence[Tensor], metas: Any = None) -> Outputs:
        """Predicts from the neck's output, (B, in_channels, X, Y) or a sequence of one such tensor.

        Returns:
            A tuple of one element, the result of :meth:`forward_single`.

        Raises:
            ValueError: If there is more than one map.
        """
        feats = [feats] if isinstance(feats, Tensor) else feats
        if len(feats) != 1:
            raise ValueError(f'TransFusionHead expects one map, got {len(feats)}')
        return (self.forward_single(feats[0], metas),)

    def predict(
        self, batch_feats: Tensor | Sequence[Tensor], batch_input_metas: list[dict]
    ) -> list[InstanceData]:
        """Predicts the boxes of every sample; see :meth:`predict_by_feat`."""
        return self.predict_by_feat(self(batch_feats, batch_input_metas), batch_input_metas)

    def predict_by_feat(self, preds_dicts: Outputs, metas: list[dict]) -> list[InstanceData]:
        """Decodes the result of :meth:`forward`.

        Args:
            preds_dicts: Result of :meth:`forward`; left unchanged.
            metas: Per sample ``box_type_3d``.

        Returns:
            Per sample ``bboxes_3d``, ``scores_3d`` (n,) and ``labels_3d`` (n,), int32.
        """
        return self.boxes(self.scored(preds_dicts[0][0]), metas)

    def scored(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Selects the outputs of the last decoder layer, in cells; :meth:`boxes` decodes them.

        Args:
            outputs: Dict of :meth:`forward_single`.

        Returns:
            ``score`` (B, classes, P), 0 for all but the class of the query; ``center``, ``height``,
            ``dim``, ``rot`` and, if the head has it, ``vel``: (B, channels, P).
        """
        last = {
            key: value if key in _SHARED else value[..., -self.num_proposals :]
            for key, value in outputs.items()
        }
        one_hot = F.one_hot(last['query_labels'], self.num_classes).transpose(1, 2)
        found = dict(score=last['heatmap'].sigmoid() * last['query_heatmap_score'] * one_hot)
        found.update((key, last[key]) for key in _CODED)
        if 'vel' in last:
            found['vel'] = last['vel']
        return found

    def boxes(self, found: dict[str, Tensor], metas: list[dict]) -> list[InstanceData]:
        """Decodes the outputs of :meth:`scored` to boxes; see :meth:`predict_by_feat`."""
        decoded = self.bbox_coder.decode(
            found['score'],
            found['rot'],
            found['dim'],
            found['center'],
            found['height'],
            found.get('vel'),
            filter=True,
        )
        results = []
        for sample, meta in strict_zip(decoded, metas):
            keep = self._nms(**sample)
            boxes = sample['bboxes'][keep]
            results.append(
                InstanceData(
                    bboxes_3d=meta['box_type_3d'](boxes, box_dim=boxes.shape[-1]),
                    scores_3d=sample['scores'][keep],
                    labels_3d=sample['labels'][keep].int(),
                )
            )
        return results

    def _nms(self, bboxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Selects the boxes to keep, bool (n,)."""
        if self.test_cfg['nms_type'] is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return kept_by_circle_nms(bboxes, scores, labels, self.test_cfg['dataset'])
