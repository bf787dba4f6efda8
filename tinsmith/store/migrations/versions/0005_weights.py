"""How much of the server each key gets while others want it, too."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("keys", sa.Column("weight", sa.Float(), nullable=False, server_default="1"))
