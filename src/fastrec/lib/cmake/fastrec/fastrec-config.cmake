# find_package(fastrec) brings the target fastrec::fastrec: the engine and its C header.
get_filename_component(_fastrec "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT EXISTS "${_fastrec}/lib/libfastrec.so")
  set(fastrec_FOUND FALSE)
  set(fastrec_NOT_FOUND_MESSAGE "no ${_fastrec}/lib/libfastrec.so: the compiled part is missing")
elseif(NOT TARGET fastrec::fastrec)
  add_library(fastrec::fastrec SHARED IMPORTED)
  set_target_properties(fastrec::fastrec PROPERTIES
    IMPORTED_LOCATION "${_fastrec}/lib/libfastrec.so"
    IMPORTED_SONAME libfastrec.so
    INTERFACE_INCLUDE_DIRECTORIES "${_fastrec}/include")
endif()
unset(_fastrec)
