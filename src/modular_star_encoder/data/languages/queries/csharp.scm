[(method_declaration name: (_) @name body: (_) @body)
 (constructor_declaration name: (_) @name body: (_) @body)] @function
[(method_declaration name: (_) @name !body) (property_declaration name: (_) @name)
 (delegate_declaration name: (_) @name) (enum_declaration name: (_) @name)] @type
[(class_declaration name: (_) @name) (struct_declaration name: (_) @name)
 (interface_declaration name: (_) @name) (record_declaration name: (_) @name)] @scope
(namespace_declaration name: (_) @name) @extension
(comment) @comment
