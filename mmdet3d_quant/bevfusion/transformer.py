"""Decoder layer of the TransFusion head."""

from __future__ import annotations

from typing import Any

from mmdet.models import DetrTransformerDecoderLayer
from torch import Tensor, nn

_POSITION = dict(input_channel=2, num_pos_feats=128)


class PositionEncodingLearned(nn.Module):
    """Learned encoding of positions.

    Args:
        input_channel: Coordinates per position.
        num_pos_feats: Channels of the encoding.
    """

    def __init__(self, input_channel: int, num_pos_feats: int = 288) -> None:
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(input_channel, num_pos_feats, 1),
            nn.BatchNorm1d(num_pos_feats),
            nn.ReLU(inplace=True),
            nn.Conv1d(num_pos_feats, num_pos_feats, 1),
        )

    def forward(self, xyz: Tensor) -> Tensor:
        """Encodes positions (B, P, input_channel) to (B, num_pos_feats, P)."""
        return self.position_embedding_head(xyz.transpose(1, 2).contiguous())


class TransformerDecoderLayer(DetrTransformerDecoderLayer):
    """DETR's decoder layer with learned positions that are added to the values, too.

    Args:
        pos_encoding_cfg: Arguments of the two position encodings.
        **kwargs: Arguments of ``mmdet.models.DetrTransformerDecoderLayer``.
    """

    def __init__(self, pos_encoding_cfg: dict = _POSITION, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.self_posembed = PositionEncodingLearned(**pos_encoding_cfg)
        self.cross_posembed = PositionEncodingLearned(**pos_encoding_cfg)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        cross_attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Applies self-attention, cross-attention and feed-forward, each followed by its norm.

        Args:
            query: (B, C, P).
            key: (B, C, K).
            value: Not used; the values are keys with their positions added.
            query_pos: Positions of the queries, (B, P, 2), in cells.
            key_pos: Positions of the keys, (B, K, 2), in cells.
            self_attn_mask: (P, P), True where attention is blocked.
            cross_attn_mask: (P, K), True where attention is blocked.
            key_padding_mask: (B, K), True where a key is padding.
            **kwargs: Passed to both attentions.

        Returns:
            (B, C, P).

        Raises:
            ValueError: If a position is missing.
        """
        if query_pos is None or key_pos is None:
            raise ValueError('TransformerDecoderLayer needs query_pos and key_pos')
        query_pos = self.self_posembed(query_pos).transpose(1, 2)
        key_pos = self.cross_posembed(key_pos).transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        query = self.self_attn(
            query=query,
            key=query,
            value=query + query_pos,
            query_pos=query_pos,
            key_pos=query_pos,
            attn_mask=self_attn_mask,
            **kwargs,
        )
        query = self.norms[0](query)
        query = self.cross_attn(
            query=query,
            key=key,
            value=key + key_pos,
            query_pos=query_pos,
            key_pos=key_pos,
            attn_mask=cross_attn_mask,
            key_padding_mask=key_padding_mask,
            **kwargs,
        )
        query = self.norms[1](query)
        return self.norms[2](self.ffn(query)).transpose(1, 2)
