"""Importing this package registers every model with timm."""

from visattn.models import biformer as biformer
from visattn.models import coatnet as coatnet
from visattn.models import cswin as cswin
from visattn.models import deit_va as deit_va
from visattn.models import halonet as halonet
from visattn.models import maxvit as maxvit
from visattn.models import nat as nat
from visattn.models import nat_isotropic as nat_isotropic
from visattn.models import pvt as pvt
from visattn.models import resnest_va as resnest_va
from visattn.models import resnet_ea as resnet_ea
from visattn.models import swin_va as swin_va
from visattn.models import transnext as transnext
