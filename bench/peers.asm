; The guest of bench/peers.py: a boot sector that any BIOS or VMM starts at 0x7c00.
;
; It goes to 64-bit mode at privilege level 3, which is fast wherever a guest is, fills memory from 2 MiB to
; TOP with random bytes, says "R" on the first serial port, and from then on rewrites HOT bytes from 2 MiB on, page by page:
; flat out, or one page every PACE cycles of the time stamp counter. After every MARK passes it says ".".
;
;   nasm -f bin -D TOP=... -D HOT=... -D PACE=... -D MARK=... -o sector.img peers.asm

TABLES  equ 0x10000             ; PML4, PDPT, four page directories: 4 GiB in pages of 2 MiB
TSS     equ 0x18000
IO_MAP  equ 104                 ; in the TSS: every port is allowed at level 3
FIRST   equ 0x200000
COM1    equ 0x3f8

        org 0x7c00
        bits 16
        cli
        xor ax, ax
        mov ds, ax
        in al, 0x92             ; A20
        or al, 2
        out 0x92, al
        lgdt [gdt_pointer]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        jmp 0x08:flat

        bits 32
flat:   mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov esp, 0x7c00
        cld
        mov edi, TABLES
        xor eax, eax
        mov ecx, 0xc000 / 4
        rep stosd

        mov dword [TABLES], TABLES + 0x1000 + 7
        mov edi, TABLES + 0x1000
        mov eax, TABLES + 0x2000 + 7
        mov ecx, 4
.pdpt:  mov [edi], eax
        add eax, 0x1000
        add edi, 8
        loop .pdpt
        mov edi, TABLES + 0x2000
        mov eax, 0x87           ; present, writable, for level 3, large
        mov ecx, 2048
.pd:    mov [edi], eax
        add eax, 0x200000
        add edi, 8
        loop .pd

        mov word [TSS + 102], IO_MAP
        mov byte [TSS + IO_MAP + 8192], 0xff
        mov eax, TABLES
        mov cr3, eax
        mov eax, cr4
        or al, 0x20             ; PAE
        mov cr4, eax
        mov ecx, 0xc0000080     ; EFER.LME
        rdmsr
        or ah, 1
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        jmp 0x18:long64

        bits 64
long64:   mov ax, 0x30
        ltr ax
        push 0x2b
        push 0x7c00
        push 2                  ; flags: no interrupts
        push 0x23
        push user
        iretq

user:   mov edi, FIRST
        mov r8, TOP
        mov rax, 88172645463325252
.fill:  mov rcx, rax            ; xorshift64
        shl rcx, 13
        xor rax, rcx
        mov rcx, rax
        shr rcx, 7
        xor rax, rcx
        mov rcx, rax
        shl rcx, 17
        xor rax, rcx
        mov [rdi], rax
        add rdi, 8
        cmp rdi, r8
        jb .fill
        mov dx, COM1
        mov al, 'R'
        out dx, al

        rdtsc
        shl rdx, 32
        lea r9, [rdx + rax]     ; when the next page is due
        xor r10d, r10d          ; passes since the last "."
.pass:  mov edi, FIRST
.page:
%if PACE
        add r9, PACE
.wait:  rdtsc
        shl rdx, 32
        add rax, rdx
        sub rax, r9
        js .wait
%endif
        inc qword [rdi]
        add rdi, 4096
        cmp rdi, FIRST + HOT
        jb .page
        inc r10d
        cmp r10d, MARK
        jb .pass
        xor r10d, r10d
        mov dx, COM1
        mov al, '.'
        out dx, al
        jmp .pass

        align 8
gdt:    dq 0
        dq 0x00cf9a000000ffff   ; 08 32-bit code
        dq 0x00cf92000000ffff   ; 10 data
        dq 0x00209a0000000000   ; 18 64-bit code
        dq 0x0020fa0000000000   ; 20 64-bit code, level 3
        dq 0x0000f20000000000   ; 28 data, level 3
        dw IO_MAP + 8192, TSS & 0xffff  ; 30 TSS
        db TSS >> 16, 0x89, 0, 0
        dq 0
gdt_pointer:
        dw gdt_pointer - gdt - 1
        dd gdt

        times 510 - ($ - $$) db 0
        dw 0xaa55
