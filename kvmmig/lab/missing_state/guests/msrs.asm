; msrs: known values in the MSRs that a system would set up; exits with 3 + the place of a wrong one in the table
;@ entry real16
%include "real16.inc"
start:
    mov si, table
put:
    mov ecx, dword [si]
    mov eax, dword [si + 4]
    mov edx, dword [si + 8]
    wrmsr
    add si, 12
    cmp si, table_end
    jne put
    call be_moved
    mov si, table
    mov bl, 3
look:
    mov ecx, dword [si]
    rdmsr
    cmp eax, dword [si + 4]
    jne wrong_msr
    cmp edx, dword [si + 8]
    jne wrong_msr
    inc bl
    add si, 12
    cmp si, table_end
    jne look
    jmp passed
wrong_msr:
    mov al, bl
    out EXIT, al

table:
    dd 0x174, 0x1230, 0                 ; SYSENTER_CS
    dd 0x175, 0x12345678, 0x00007f00    ; SYSENTER_ESP
    dd 0x176, 0x23456789, 0x00007f01    ; SYSENTER_EIP
    dd 0xc0000081, 0, 0x00230010        ; STAR
    dd 0xc0000082, 0x3456789a, 0x00007f02    ; LSTAR
    dd 0xc0000083, 0x456789ab, 0x00007f03    ; CSTAR
    dd 0xc0000084, 0x47700, 0           ; SFMASK
    dd 0xc0000102, 0x56789abc, 0x00007f04    ; KERNEL_GS_BASE
    dd 0x277, 0x00070106, 0x00070106    ; PAT
    dd 0x1a0, 0, 0                      ; MISC_ENABLE: fast strings are on by default
    dd 0x3b, 0x789a, 0                  ; TSC_ADJUST
    dd 0x4b564d01, 0xa001, 0            ; KVM_SYSTEM_TIME_NEW: where kvmclock's page is
table_end:
