# ruff: noqa: E501  HLO has long lines
from __future__ import annotations

import pytest

from trainfw.hlo import Place, Shape, count_trips, parse_module

MODULE = """HloModule jit_step, is_scheduled=false, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=4

FileNames
1 "/home/me/user.py"
2 "/x/lib/python3.11/site-packages/optax/_src/base.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=2 end_column=2}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=2 end_column=2}
3 {file_name_id=1 function_name_id=1 line=20 end_line=20 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=PARENT1}
2 {file_location_id=3 parent_frame_id=PARENT2}
3 {file_location_id=2 parent_frame_id=PARENT3}


%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %two = s32[] constant(2)
  %j = s32[] get-tuple-element(%q), index=0
  %next_j = s32[] add(%two, %j)
  %y = f32[8]{0} get-tuple-element(%q), index=1
  %reduced = f32[8]{0} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add, metadata={op_name="jit(step)/psum" stack_frame_id=3}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next_j, %reduced)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %seven = s32[] constant(7)
  %at = s32[] get-tuple-element(%p), index=0
  ROOT %more = pred[] compare(%at, %seven), direction=LT
}

%body (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (s32[], f32[8]{0}) parameter(0)
  %one = s32[] constant(1)
  %next = s32[] add(%r#0, %one)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %r#1)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
  %made = f32[8]{0} get-tuple-element(%loop), index=1
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%next, %made)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%limit, %s#0), direction=GE
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %first = s32[] constant(0)
  %carry = (s32[], /*index=1*/f32[8]{0}) tuple(%first, %x)
  %while = (s32[], f32[8]{0}) while(%carry), condition=%condition, body=%body, metadata={op_name="jit(step)/while" stack_frame_id=1}
  %old = bf16[2,3]{1,0:T(8,128)} constant({...}), metadata={op_name="a \\"quoted, {name\\""}
  ROOT %result = f32[8]{0} get-tuple-element(%while), index=1
}
"""


def module(parents: tuple[int, int, int]):
    text = MODULE
    for number, parent in enumerate(parents, 1):
        text = text.replace(f"PARENT{number}", str(parent))
    return parse_module(text)


@pytest.mark.parametrize("parents", [(1, 2, 3), (0, 1, 2)], ids=["one too high", "as they are"])
def test_places_are_the_innermost_of_user_code(parents):
    parsed = module(parents)
    reduced = parsed.computations["inner_body"].instructions["reduced"]
    assert reduced.place == Place("/home/me/user.py", 20)  # the innermost frame is optax's
    assert parsed.computations["main"].instructions["while"].place == Place("/home/me/user.py", 10)


def test_instructions():
    main = module((1, 2, 3)).computations["main"]
    old = main.instructions["old"]
    assert old.place is None
    assert old.shapes == (Shape("bf16", (2, 3)),)
    assert old.bytes == 12
    assert main.instructions["carry"].shapes == (Shape("s32", ()), Shape("f32", (8,)))
    assert main.instructions["carry"].operands == ("first", "x")
    assert main.root.name == "result"
    assert main.instructions["while"].attributes["body"] == "%body"


def test_times_are_products_of_trip_counts():
    parsed = module((1, 2, 3))
    assert parsed.num_partitions == 4
    assert parsed.times == {"main": 1, "body": 4, "inner_body": 4 * 4}  # i <= 3 by 1, and j < 7 by 2


@pytest.mark.parametrize(
    ("start", "limit"),
    [
        ("add(%one, %two)", 3),
        ("subtract(%two, %one)", 1),
        ("multiply(%two, %two)", 4),
        ("minimum(%one, %two)", 1),
        ("maximum(%one, %two)", 2),
        ("clamp(%one, %zero, %two)", 1),
        ("convert(%two)", 2),
    ],
)
def test_bounds_made_of_constants(start, limit):
    made = f"  %two = s32[] constant(2)\n  %made_start = s32[] {start}\n  %start ="
    text = MODULE.replace("  %start =", made).replace("tuple(%zero, %r#1)", "tuple(%made_start, %r#1)")
    assert parse_module(text).times["inner_body"] == 4 * len(range(limit, 7, 2))


def test_a_loop_that_need_not_end_counts_once():
    parsed = parse_module(MODULE.replace("%next = s32[] add(%r#0, %one)", "%next = s32[] multiply(%r#0, %one)"))
    assert parsed.times["body"] == 1


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "trips"),
    [
        (0, 5, 1, "LT", 5),
        (0, 5, 2, "LT", 3),
        (0, 4, 2, "LE", 3),
        (5, 0, -1, "GT", 5),
        (4, 0, -2, "GE", 3),
        (5, 5, 1, "LT", 0),
        (9, 5, 1, "LT", 0),
        (0, 5, -1, "LT", None),
        (0, 5, 0, "LT", None),
        (0, 5, 1, "NE", None),
    ],
)
def test_count_trips(start, limit, step, direction, trips):
    assert count_trips(start, limit, step, direction) == trips


@pytest.mark.parametrize(("dtype", "size"), [("s4", 4), ("pred", 8), ("f8e4m3fn", 8), ("bf16", 16), ("c128", 128)])
def test_sizes_of_dtypes(dtype, size):
    assert Shape(dtype, (2,)).bytes == 2 * size // 8
