"""C structs inside Numba functions: `view(MATRIX, address).rows` is one load. Knows numpy dtypes, not the meaning of
fields.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_getattr_generic, register_model
from numba.core.typing.templates import AttributeTemplate, infer_getattr


class View(types.Type):
    """The address of a struct with the fields of a numpy record; a nested record is a view again."""

    def __init__(self, record: types.Record) -> None:
        self.record = record
        super().__init__(name=f"View{hash(record):x}")


@register_model(View)
class _ViewModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: View) -> None:
        super().__init__(manager, fe_type, manager.lookup(types.int64).get_value_type())


@infer_getattr
class _Fields(AttributeTemplate):
    key = View

    def generic_resolve(self, view: View, name: str) -> Any:
        field = view.record.typeof(name)
        return View(field) if isinstance(field, types.Record) else field


@lower_getattr_generic(View)
def _load_field(context: Any, builder: Any, view: View, address: Any, name: str) -> Any:
    kind = view.record.typeof(name)
    field = builder.add(address, address.type(view.record.offset(name)))
    if isinstance(kind, types.Record):
        return field
    llvm_type = context.get_data_type(kind)
    return builder.load(builder.inttoptr(field, llvm_type.as_pointer()), align=1)


@intrinsic
def address_of(typingctx, view):
    """A view's address."""

    def codegen(context, builder, sig, args):
        return args[0]

    return types.int64(view), codegen


@intrinsic
def view(typingctx, dtype, address):
    """The struct of a numpy dtype at an address."""
    result = View(dtype.dtype)

    def codegen(context, builder, sig, args):
        return args[1]

    return result(dtype, types.int64), codegen
