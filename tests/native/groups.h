// The groups of native tests.
#pragma once

#include <string>

namespace tautorch::tests {

void test_golden(const std::string &file);
void test_int8_linear();
void test_longest_rows();
void test_special_rows();
void test_weight_only();
void test_half_precision();
void test_sparse_linear();
void test_sparse_float();
void test_lowrank();
void test_int8_conv2d();
void test_weight_only_conv2d();
void test_sparse_conv2d();

} // namespace tautorch::tests
