"""Importing this package registers every model with timm."""

from visattn.models import nat as nat
from visattn.models import nat_isotropic as nat_isotropic
