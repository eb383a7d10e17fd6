"""Units of measurement: their names in three languages, and what converts into what.

A unit is a kind and a factor: "g" is the kind "mg" times 1000. Below a fraction bar a mass is that
of a body: mg/kg is never made a plain number, nor is a child's weight made a dose. Standard library
only.
"""

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """What a unit measures, and its size in that kind's first unit."""

    kind: str
    factor: Fraction


# kind: unit names of one size, "|" before the factor; the first line of a kind is its first unit.
_TABLE = """
mg: mg milligram milligrams mgs ミリグラム 毫克 | 1
mg: g gram grams gm gms グラム 克 | 1000
mg: mcg ug μg µg microgram micrograms マイクログラム 微克 | 1/1000
mg: ng nanogram nanograms 纳克 | 1/1000000
mg: pg picogram picograms | 1/1000000000
kg: kg kilogram kilograms kgs キログラム 公斤 千克 | 1
kg: lb lbs pound pounds ポンド 磅 | 0.45359237
ml: ml milliliter milliliters millilitre millilitres cc ミリリットル 毫升 | 1
ml: μl ul µl microliter microliters microlitre microlitres | 1/1000
ml: cl | 10
ml: dl deciliter deciliters decilitre decilitres デシリットル | 100
ml: l liter liters litre litres リットル 升 | 1000
mm: mm millimeter millimeters millimetre millimetres ミリメートル 毫米 | 1
mm: um μm µm micron microns micrometer micrometers | 1/1000
mm: nm nanometer nanometers | 1/1000000
mm: cm centimeter centimeters centimetre centimetres センチメートル センチ 厘米 公分 | 10
mm: m meter meters metre metres メートル 米 | 1000
mm: km kilometer kilometers | 1000000
mm: inch inches | 25.4
mm: ft foot feet | 304.8
m2: m2 m^2 sqm 平方メートル 平方米 | 1
m2: cm2 cm^2 | 1/10000
min: min mins minute minutes 分間 分钟 分鐘 | 1
min: s sec secs second seconds 秒 秒間 | 1/60
min: ms msec msecs millisecond milliseconds ミリ秒 毫秒 | 1/60000
min: h hr hrs hour hours 時間 小时 小時 时间 | 60
min: d day days 日 日間 天 daily | 1440
min: week weeks wk wks 週間 週 周 weekly | 10080
month: month months か月 ヶ月 ヵ月 カ月 ケ月 个月 個月 monthly | 1
month: year years yr yrs 年 年間 歳 才 岁 歲 | 12
times: times time doses x 回 次 beats beat breaths 拍 | 1
mmol: mmol millimole millimoles millimol | 1
mmol: μmol umol µmol micromole micromoles | 1/1000
mmol: nmol | 1/1000000
mmol: pmol | 1/1000000000
mmol: mol mole moles | 1000
meq: meq milliequivalents mval | 1
meq: eq equivalents | 1000
unit: unit units iu u 単位 单位 國際單位 国际单位 国際単位 | 1
unit: miu mu | 1/1000
mmhg: mmhg torr 毫米汞柱 水銀柱ミリメートル | 1
mmhg: kpa | 7.50061683
mmhg: cmh2o | 0.73555912
celsius: °c ℃ celsius degc 摂氏度 摄氏度 | 1
fahrenheit: °f fahrenheit degf | 1
kcal: kcal kilocalories キロカロリー 千卡 大卡 | 1
kcal: cal calories | 1/1000
kcal: kj kilojoules 千焦 | 0.239005736
%: % percent pct パーセント | 1
tablet: tablet tablets pill pills tab tabs capsule capsules 錠 片 粒 カプセル | 1
dose: dose administration | 1
drop: drop drops gtt 滴 | 1
puff: puff puffs spray sprays | 1
vial: vial vials ampoule ampoules bottle bottles | 1
spoon: teaspoon teaspoons tablespoon tablespoons | 1
person: patient patients person persons people child children 人 例 | 1
mosm: mosm mosmol | 1
mme: mme | 1
point: point points 点 | 1
"""


def _read(table: str) -> dict[str, Unit]:
    units = {}
    for line in table.strip().splitlines():
        kind, _, rest = line.partition(": ")
        names, _, factor = rest.partition(" | ")
        units |= {name: Unit(kind, Fraction(factor)) for name in names.split()}
    return units


UNITS = _read(_TABLE)
# Below the fraction bar: the mass of a body, in kg.
_BELOW = {"mg": Fraction(1, 1_000_000)}
# Amounts of one substance that only its molar mass, charge or potency converts.
_BY_SUBSTANCE = {"mg", "mmol", "meq", "unit"}
_COMPOUND = ("min", "month", "mm")  # kinds written in several units: 3 weeks 4 days, 5 ft 7 inches


class Measure(NamedTuple):
    """A unit with what it is divided by: the kinds, and the size in their first units."""

    kind: str
    factor: Fraction


def measure(name: str, pers: tuple[str, ...]) -> Measure:
    """The measure of "mg" per "kg" per "day"; times a day are times."""
    unit = UNITS[name] if name else Unit("times" if pers else "", Fraction(1))
    kinds, factor = [], unit.factor
    if unit.kind in ("point", "times") and not pers:
        return Measure("" if unit.kind == "point" else "times", factor)
    for per in pers:
        below = UNITS[per]
        if unit.kind == "times" and per in _DAILY:
            continue
        kinds.append("kg" if below.kind in _BELOW else below.kind)
        factor /= below.factor * (_BELOW[below.kind] if below.kind in _BELOW else 1)
    return Measure("/".join([unit.kind, *sorted(kinds)]), factor)


_DAILY = {name for name, unit in UNITS.items() if unit == Unit("min", Fraction(1440))}


def needs_substance(kind: str, other: str) -> bool:
    """The two convert into each other only for a known substance: mg/dl and mmol/l."""
    (first, _, below), (second, _, other_below) = kind.partition("/"), other.partition("/")
    return first != second and below == other_below and {first, second} <= _BY_SUBSTANCE


def is_compound(kind: str) -> bool:
    """Measured in several units at once, as 3 weeks 4 days."""
    return kind in _COMPOUND
