from .programs import check as check
from .programs import check_program as check_program
from .report import Finding as Finding
from .report import Report as Report
from .rules import RULES as RULES
from .rules import Rule as Rule
