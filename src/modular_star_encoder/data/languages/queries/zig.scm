(Decl (FnProto function: (IDENTIFIER) @name) (Block) @body) @function
(Decl (VarDecl variable_type_function: (IDENTIFIER) @name
    (ErrorUnionExpr (SuffixExpr (ContainerDecl))))) @scope
[(line_comment) (doc_comment)] @comment
